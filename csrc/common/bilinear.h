// Bilinear resampling along one axis, exactly the taps of F.interpolate(mode="bilinear"), in one place.
//
// In integers: position and weight of an output are one quotient, so neither the taps nor where they change depend on
// rounding. All outputs between two neighbouring inputs form a *quad* (an interval, along one axis). Quad q reads the
// inputs q - 1 and q, for q = 0 ... in: what lies before the first input or behind the last one are quads of their own,
// whose weight is all on the input that exists. So input i receives from quad i (its weight w1) and quad i + 1 (w0),
// and from no other: the transpose of the resampling, which the gradient needs, is a sum over neighbours, no scatter.
// Forward, such a quad may read the input that exists twice and take half of each: the same number, and infinity stays
// what it is, where a weight of 0 would make NaN of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "dtype.h"

namespace segadv {

// Division of n >= 0 by a number that stays the same: for n below 2^31 a product and a shift (Granlund and Montgomery
// 1994). A GPU has no instruction for divisions: one of 32 bits costs it about twenty, of 64 bits a hundred.
struct Divisor {
  int64_t value = 1;
  uint32_t factor = 1;
  int32_t shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t value) : value(value), factor(0) {
    while (shift < 31 && int64_t{1} << shift < value) ++shift;
    const int64_t power = int64_t{1} << shift;
    if (value <= 0 || value > power) return;  // no divisor; or larger than any n that is multiplied, which gives 0
    factor = static_cast<uint32_t>((static_cast<uint64_t>(power - value) << 32) / static_cast<uint64_t>(value) + 1);
  }

  SEGADV_INLINE int32_t quotient(int32_t n) const {
    const uint32_t low = static_cast<uint32_t>(n);
    return static_cast<int32_t>((static_cast<uint32_t>(uint64_t{low} * factor >> 32) + low) >> shift);
  }
  SEGADV_INLINE int64_t quotient(int64_t n) const {
    return n >> 31 != 0 ? n / value : quotient(static_cast<int32_t>(n));
  }
};

// a * b; of both a GPU takes the lower 32 bits, which hold all that an Axis counts (is_narrow).
SEGADV_INLINE int64_t product(int64_t a, int64_t b) {
#if defined(__CUDA_ARCH__)
  return static_cast<int64_t>(uint64_t{static_cast<uint32_t>(a)} * static_cast<uint32_t>(b));
#else
  return a * b;
#endif
}

// Output o lies at (start + o * step) / denominator, counted in quads; that is never negative.
struct Axis {
  int64_t in, out, step, start, denominator;
  Divisor by_step, by_denominator;  // by_step: by 1 where step is 0
  float inverse_float;              // 1 / denominator
  double inverse_double;

  SEGADV_INLINE int64_t quad_of(int64_t o) const { return by_denominator.quotient(start + product(o, step)); }

  // What the division leaves over, in [0, denominator) for an output in this quad. In 32 bits too: it is narrow.
  template <class Int>
  SEGADV_INLINE Int rest(Int o, Int quad) const {
    using Wraps = std::make_unsigned_t<Int>;
    return static_cast<Int>(static_cast<Wraps>(start) + static_cast<Wraps>(o) * static_cast<Wraps>(step) -
                            static_cast<Wraps>(quad) * static_cast<Wraps>(denominator));
  }

  // How many outputs from o on lie in its quad, from what the division leaves over there; 0 where o lies behind it, or
  // behind the last output.
  template <class Int>
  SEGADV_INLINE Int outputs_from(Int o, Int rest) const {
    const Int left = static_cast<Int>(out) - o, behind = static_cast<Int>(denominator) - rest;
    if (behind <= 0 || left <= 0) return 0;
    if (step == 0) return left;
    const Int found = by_step.quotient(static_cast<Int>(behind + static_cast<Int>(step) - 1));
    return found < left ? found : left;
  }

  // The lowest output that lies in this quad or behind it; `out` for quads behind the last one.
  SEGADV_INLINE int64_t first_output(int64_t quad) const {
    const int64_t distance = product(quad, denominator) - start;
    if (quad > in) return out;
    if (distance <= 0) return 0;
    const int64_t first = by_step.quotient(distance + by_step.value - 1);
    return first < out ? first : out;  // of no outputs, aligned, it would be 1
  }

  // Whether a rest fits into 32 bits, also that of some outputs behind the quad, where a GPU's last chunk of it may
  // begin: it has no registers of 64 bits.
  SEGADV_INLINE bool is_narrow() const { return 2 * denominator + 16 * step < int64_t{1} << 31; }

  // No quad has more outputs.
  SEGADV_INLINE int64_t most_outputs() const {
    const int64_t most = by_step.quotient(denominator + by_step.value - 1);
    return step > 0 && most < out ? most : out;
  }
};

inline Axis make_axis(int64_t in, int64_t out, bool align_corners) {
  Axis axis{};
  axis.in = in, axis.out = out;
  axis.step = align_corners ? in - 1 : 2 * in;
  axis.denominator = align_corners ? (out > 1 ? out - 1 : 1) : (out > 0 ? 2 * out : 1);
  axis.start = align_corners ? axis.denominator : in + out;
  axis.by_step = Divisor(axis.step > 0 ? axis.step : 1);
  axis.by_denominator = Divisor(axis.denominator);
  axis.inverse_float = 1.0f / static_cast<float>(axis.denominator);
  axis.inverse_double = 1.0 / static_cast<double>(axis.denominator);
  return axis;
}

// Weights of a quad's two inputs as a function of the rest: w1 = rest / denominator, rounded once, w0 = 1 - w1; behind
// the edges half and half, of an input that is read twice. Division is slow on a GPU: a product, corrected by what it
// leaves over.
template <class A>
struct QuadWeights {
  A denominator, slope, shift;
  template <class Int>
  SEGADV_INLINE QuadWeights(const Axis& axis, Int quad)
      : denominator(static_cast<A>(static_cast<Int>(axis.denominator))) {
    const bool between = quad > 0 && quad < static_cast<Int>(axis.in);
    slope = between ? inverse(axis, A()) : A(0);
    shift = between ? A(0) : A(0.5);
  }
  static SEGADV_INLINE float inverse(const Axis& axis, float) { return axis.inverse_float; }
  static SEGADV_INLINE double inverse(const Axis& axis, double) { return axis.inverse_double; }
  template <class Int>
  SEGADV_INLINE A w1(Int rest) const {
    const A value = static_cast<A>(rest);
    const A quotient = value * slope;
    return std::fma(std::fma(-quotient, denominator, value), slope, quotient) + shift;
  }
};

// What w1 is for the transpose: behind the edges all goes to the input that exists.
template <class A>
SEGADV_INLINE A transposed(A w1, int64_t quad, int64_t in) {
  return quad > 0 && quad < in ? w1 : A(quad == 0);
}

// The same as one output sees it: inputs i0 and i1 = min(i0 + 1, in - 1) with weights w0 = 1 - w1 and w1. i0 never
// decreases with o.
struct Tap {
  int64_t i0, i1;
  double w1;
};

SEGADV_INLINE Tap bilinear_tap(int64_t o, int64_t in, int64_t out, bool align_corners) {
  const Axis axis = make_axis(in, out, align_corners);
  const int64_t quad = axis.quad_of(o), i0 = quad > 0 ? quad - 1 : 0;
  const bool between = quad > 0 && quad < in, twice = i0 + 1 == in;
  return {i0, twice ? i0 : i0 + 1,
          between ? static_cast<double>(axis.rest(o, quad)) / static_cast<double>(axis.denominator)
                  : (twice ? 0.5 : 0.0)};
}

}  // namespace segadv
