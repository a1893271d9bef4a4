// exp and log as the fused losses need them: polynomials without branches, because a call to expf stops vectorisation.
// A GPU has an instruction for the exponential, whose error of some ulp stands beside a term of 1.
//
// Coefficients: log, Cephes (S. Moshier), logf; exp, a minimax fit. Errors, measured over their ranges: at most 1.5 ulp
// (exp: where its result is a normal number).
#pragma once

#include <cmath>

#include "dtype.h"

namespace segadv {

#if defined(__CUDA_ARCH__)
constexpr float kLog2e = 1.44269504088896341f;  // exp(x) = 2^(x * kLog2e)

// The instruction itself: exp2f and __expf spend three more on results that are subnormal.
__device__ __forceinline__ float exp2_instruction(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

// exp(x) for x <= 0 or NaN (a logit minus the largest one).
// 0 below -87.7, where float would be subnormal.
SEGADV_INLINE float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return exp2_instruction(x * kLog2e);
#else
  // exp(y) = 2^n * exp(r) with an integer n and |r| <= log(2) / 2
  constexpr float kLowest = -88.0297f;   // n = -127, which 2^n below makes 0 of
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
  const float y = x < kLowest ? kLowest : x;
  const float shifted = y * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts, so that the first is exact
  float p = 1.38436059933e-3f;
  p = p * r + 8.37419554591e-3f;
  p = p * r + 4.16680052876e-2f;
  p = p * r + 1.66664302349e-1f;
  p = p * r + 4.99999940395e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bit_cast<float>((bit_cast<uint32_t>(shifted) - 0x4b400000u + 127u) << 23);
#endif
}
SEGADV_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// exp(x); where x > 88, infinity or a number of at least 1e38.
SEGADV_INLINE float exp_or_huge(float x) {
#if defined(__CUDA_ARCH__)
  return exp2_instruction(x * kLog2e);
#else
  return exp_nonpositive(x > 88.0f ? 88.0f : x);
#endif
}
SEGADV_INLINE double exp_or_huge(double x) { return std::exp(x); }

// 1 / x of a finite sum of exponentials. On a GPU the instruction, 1 ulp off, and one step of Newton's method: the
// gradient at the label is the result minus 1, where the pixel is clear all rounding, and not of zero mean.
SEGADV_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return fmaf(fmaf(-x, result, 1.0f), result, result);
#else
  return 1.0f / x;
#endif
}
SEGADV_INLINE double reciprocal(double x) { return 1.0 / x; }

// log(x) for x >= 1 (a sum of exponentials, one of which is 1), infinity or NaN.
SEGADV_INLINE float log_of_sum(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  const float m = bit_cast<float>(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  const float k = static_cast<float>(e);
  const float square = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float tail = p * m * square - 2.12194440e-4f * k - 0.5f * square;
  const float result = (m + tail) + 0.693359375f * k;
  return x <= 3.0e38f ? result : x;  // infinity and NaN
}
SEGADV_INLINE double log_of_sum(double x) { return std::log(x); }

// SegPGD's weights of a pixel whose largest logit is the label's, and of any other.
template <class A>
struct SegPGDWeights {
  A correct, wrong;
  SEGADV_INLINE SegPGDWeights(double lambda, bool targeted)
      : correct(static_cast<A>(targeted ? lambda : 1.0 - lambda)),
        wrong(static_cast<A>(targeted ? 1.0 - lambda : lambda)) {}
};

// CosPGD's: the cosine of softmax and one-hot label. `above` is the label's logit above what is subtracted from all
// logits, `squares` the sum of the squared exponentials.
template <class A>
SEGADV_INLINE A cospgd_weight(A above, A squares, bool targeted) {
  const A cosine = exp_nonpositive(above) / std::sqrt(squares);
  return targeted ? A(1) - cosine : cosine;
}

}  // namespace segadv
