// How a kernel walks over the pixels, and what all kernels share: labels, logits, outputs of the labels' size, sums.
//
// The twin of cpu/tiles.h and cpu/up_tiles.h. A thread owns P pixels and goes through the classes one after the other.
// Four walks:
//
// * logits of the labels' size: P neighbours of a row, as many as 16 bytes of logits hold where sizes, strides and
//   addresses allow (kVector); else one pixel.
// * the same in channels_last, a pixel's classes neighbours, rows without a gap between them: one pixel, whose logits a
//   warp loads, and whose gradients it stores, together, through shared memory (`ChannelsLast`).
// * logits that become four times as large or more: P = 4 or 8 pixels of a column that lie in one quad row
//   (common/bilinear.h). Two rows of logits serve them all: both are resampled along x once per class, and a pixel is
//   two multiplications more. Quad rows of more than 8 rows are cut into chunks.
// * other resampled logits: one pixel, four taps per class.
//
// Neighbouring threads own neighbouring columns, and go on in the next row of pixels or quads where one ends.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "common/bilinear.h"
#include "common/dtype.h"
#include "common/margin.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace segadv::cuda {

constexpr int kColumn = 8;  // most pixels of a thread in a quad row; half as many where the quads are that low

// Blocks that a multiprocessor should hold at once, of kernels that resample: so many registers are theirs. Without a
// number the assembler aims at more, and spills.
template <class S>
constexpr int kBlocks = sizeof(S) < 8 ? 4 : 2;

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();
template <class A>
constexpr A kLowest = std::numeric_limits<A>::lowest();

// How the pixels of an image are dealt out to threads. Where an image is one long row, rows = 1.
struct Walk {
  int64_t rows, columns;  // of the labels, to be walked over
  int64_t items;          // threads' shares of an image;
  Divisor across;         // ... of a row
  Divisor chunks;         // chunks of a quad row
  Divisor blocks;         // blocks of an image
  Axis y, x;              // of the resampling
  bool dense;             // ChannelsLast: whether the classes of all pixels lie together
};

// What a block leaves for `finish`.
struct Partial {
  double sum0, sum1;
  int32_t valid, bad;
};

template <class T>
__device__ __forceinline__ T* at(const TensorView& view, int64_t offset) {
  return static_cast<T*>(view.data) + offset;
}

// An offset of i >= 0 elements: no sign of i, which a GPU would have to multiply too.
template <class Int>
__device__ __forceinline__ int64_t scaled(Int i, int64_t stride) {
  return static_cast<int64_t>(uint64_t{static_cast<std::make_unsigned_t<Int>>(i)} * static_cast<uint64_t>(stride));
}

// Labels that are not valid: to be ignored, or of a pixel that does not exist; and those that are no class.
constexpr int32_t kIgnored = -1, kBad = -2;

// The pixels of one thread.
template <class S, int P, bool kUp>
struct Pixels {
  using Storage = S;
  using A = Compute<S>;
  static constexpr int kPixels = P;
  static constexpr bool kResamples = kUp;
  static constexpr bool kTakesVectors = !kUp && P > 1;
  static constexpr bool kIsColumn = kUp && P > 1;
  static constexpr int kUnroll = kIsColumn ? 1 : (kUp ? 2 : 4);  // classes whose logits are loaded at once

  using Index = std::conditional_t<kUp, int32_t, int64_t>;  // an image of the logits' size may be one long row

  int32_t n;      // image
  Index y, x;     // the first pixel
  int64_t map;    // its offset in a dense [N, H, W]
  Index map_step;
  int count;  // pixels that exist, 0 ... P
  const S* tap[kUp ? 4 : 1];  // of class 0
  int64_t stride_c;
  A wx1, wy1[kUp ? P : 1], wy0[kUp ? P : 1];

  __device__ __forceinline__ Pixels(const Problem& problem, const Walk& walk) {
    n = walk.blocks.quotient(static_cast<int32_t>(blockIdx.x));
    const uint32_t block = blockIdx.x - static_cast<uint32_t>(n) * static_cast<uint32_t>(walk.blocks.value);
    const int64_t item = int64_t{block} * kThreads + threadIdx.x;
    const bool inside = item < walk.items;
    const Index row = inside ? static_cast<Index>(walk.across.quotient(item)) : 0;
    using Wraps = std::make_unsigned_t<Index>;
    const Wraps before = static_cast<Wraps>(row) * static_cast<Wraps>(walk.across.value);
    const Index column = inside ? static_cast<Index>(static_cast<Wraps>(item) - before) : 0;
    Index quad_y = 0;
    x = kTakesVectors ? column * P : column;
    if constexpr (kIsColumn) {
      quad_y = walk.chunks.quotient(row);
      y = static_cast<Index>(walk.y.first_output(quad_y)) + (row - quad_y * static_cast<Index>(walk.chunks.value)) * P;
      const Index left = walk.y.outputs_from(y, walk.y.rest(y, quad_y));
      count = !inside ? 0 : (left < P ? left : P);
    } else {
      y = row;
      count = inside ? P : 0;
      if constexpr (kUp) quad_y = static_cast<Index>(walk.y.quad_of(y));
    }
    map = scaled(scaled(n, walk.rows) + y, walk.columns) + x;
    map_step = kUp ? static_cast<Index>(walk.columns) : 1;
    const TensorView& logits = problem.logits;
    stride_c = logits.stride[1];
    if constexpr (kUp) {
      set_taps(logits, walk.y, walk.x, quad_y, static_cast<Index>(walk.x.quad_of(x)));
    } else if (logits.data != nullptr) {
      tap[0] = at<const S>(logits, offset(logits, 2));
    }
  }

  // A column of pixels where the caller says: `count` of them from (y, x) on, in this quad. Without logits' data only
  // labels and maps can be read.
  __device__ __forceinline__ Pixels(const Problem& problem, const Axis& axis_y, const Axis& axis_x, int32_t n,
                                    int32_t y, int32_t x, int32_t quad_y, int32_t quad_x, int count)
      : n(n), y(y), x(x), map_step(static_cast<int32_t>(axis_x.out)), count(count) {
    static_assert(kIsColumn);
    map = scaled(scaled(n, axis_y.out) + y, axis_x.out) + x;
    stride_c = problem.logits.stride[1];
    set_taps(problem.logits, axis_y, axis_x, quad_y, quad_x);
  }

  // All four taps exist for every thread, also for one without pixels: behind the edges they are the same ones twice.
  __device__ __forceinline__ void set_taps(const TensorView& logits, const Axis& axis_y, const Axis& axis_x,
                                           int32_t quad_y, int32_t quad_x) {
    if (logits.data != nullptr) {
      const int64_t right = quad_x > 0 && quad_x < static_cast<int32_t>(axis_x.in) ? logits.stride[3] : 0;
      const int64_t lower = quad_y > 0 && quad_y < static_cast<int32_t>(axis_y.in) ? logits.stride[2] : 0;
      tap[0] = at<const S>(logits, scaled(n, logits.stride[0])) +
               scaled(quad_y > 0 ? quad_y - 1 : 0, logits.stride[2]) +
               scaled(quad_x > 0 ? quad_x - 1 : 0, logits.stride[3]);
      tap[1] = tap[0] + right;
      tap[2] = tap[0] + lower;
      tap[3] = tap[2] + right;
    }
    wx1 = QuadWeights<A>(axis_x, quad_x).w1(axis_x.rest(x, quad_x));
    const QuadWeights<A> weights(axis_y, quad_y);
    const int32_t rest = axis_y.rest(y, quad_y);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      wy1[i] = weights.w1(rest + i * static_cast<int32_t>(axis_y.step));
      wy0[i] = A(1) - wy1[i];
    }
  }

  // The logits of one class.
  __device__ __forceinline__ void load(int64_t c, A (&z)[P]) const {
    const int64_t plane = c * stride_c;
    if constexpr (kUp) {
      const Rows rows = resample_rows(tap[0] + plane, tap[1] + plane, tap[2] + plane, tap[3] + plane);
#pragma unroll
      for (int i = 0; i < P; ++i) z[i] = between(rows, i);
    } else {
      const Pack<S, P> pack = load_pack<P>(tap[0] + plane);
#pragma unroll
      for (int i = 0; i < P; ++i) z[i] = to_compute(pack.values[i]);
    }
  }

  // The two rows of logits between which the pixels lie, at their column. Fused by hand, here and below: the compiler
  // would fuse either product, one way here and another there, and what the forward kept of a logit (the label's, or
  // the largest one) would differ by its rounding from what the gradient computes.
  struct Rows {
    A upper, lower;
  };
  __device__ __forceinline__ Rows resample_rows(const S* tap0, const S* tap1, const S* tap2, const S* tap3) const {
    const A wx0 = A(1) - wx1;
    return {std::fma(wx1, to_compute(*tap1), wx0 * to_compute(*tap0)),
            std::fma(wx1, to_compute(*tap3), wx0 * to_compute(*tap2))};
  }
  __device__ __forceinline__ A between(const Rows& rows, int i) const {
    return std::fma(wy1[i], rows.lower, wy0[i] * rows.upper);
  }

  // Calls f(c, rows) for the classes [begin, end). kAtOnce: classes whose logits are loaded at once.
  template <class Index = int32_t, int kAtOnce = 1, class F>
  __device__ __forceinline__ void for_each_class(Index begin, Index end, F&& f) const {
    int64_t plane = begin * stride_c;
#pragma unroll kAtOnce
    for (Index c = begin; c < end; ++c, plane += stride_c)
      f(static_cast<int32_t>(c), resample_rows(tap[0] + plane, tap[1] + plane, tap[2] + plane, tap[3] + plane));
  }

  // The logits of each pixel's label, without a look at the other classes; 0 where not valid. Pixels above one another
  // mostly have one label.
  __device__ __forceinline__ void load_own(const int32_t (&label)[P], A (&own)[P]) const {
    Rows rows;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      if (i == 0 || label[i] != label[i - 1]) {
        const int64_t plane = scaled(label[i] >= 0 ? label[i] : 0, stride_c);
        rows = resample_rows(tap[0] + plane, tap[1] + plane, tap[2] + plane, tap[3] + plane);
      }
      own[i] = label[i] >= 0 ? between(rows, i) : A(0);
    }
  }

  // Offset of the first pixel in a tensor [N, H, W], or [N, C, H, W] if `dim_y` is 2, and how far apart in the former
  // the pixels are.
  __device__ __forceinline__ int64_t offset(const TensorView& view, int dim_y = 1) const {
    return scaled(n, view.stride[0]) + scaled(y, view.stride[dim_y]) + scaled(x, view.stride[dim_y + 1]);
  }
  __device__ __forceinline__ int64_t step(const TensorView& view) const { return view.stride[kUp ? 1 : 2]; }

  // Labels as int32, those that are not valid negative. Returns valid pixels + bad labels * 2^16. All are loaded before
  // the first one is judged.
  __device__ __forceinline__ int32_t labels(const Problem& problem, int32_t (&label)[P]) const {
    int64_t value[P];
#pragma unroll
    for (int i = 0; i < P; ++i) value[i] = problem.ignore_index;
    const auto load = [&](auto zero) {
      load_some(at<const decltype(zero)>(problem.labels, offset(problem.labels)), step(problem.labels), value);
    };
    switch (problem.labels.dtype) {
      case DType::kInt64: load(int64_t{}); break;
      case DType::kInt32: load(int32_t{}); break;
      case DType::kInt16: load(int16_t{}); break;
      default: load(uint8_t{});
    }
    int32_t counts = 0;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const bool is_class = static_cast<uint64_t>(value[i]) < static_cast<uint64_t>(problem.logits.size[1]);
      label[i] = value[i] == problem.ignore_index ? kIgnored : (is_class ? static_cast<int32_t>(value[i]) : kBad);
      if (label[i] >= 0) ++counts;
      if (label[i] == kBad) counts += 1 << 16;
    }
    return counts;
  }

  // What does not exist keeps its value.
  template <class T, class V>
  __device__ __forceinline__ void load_some(const T* from, int64_t between, V (&values)[P]) const {
    if constexpr (kTakesVectors) {
      if (count == 0) return;
      const Pack<T, P> pack = load_pack<P>(from);
#pragma unroll
      for (int i = 0; i < P; ++i) values[i] = static_cast<V>(pack.values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < P; ++i, from += between) {
        if (i < count) values[i] = static_cast<V>(*from);
      }
    }
  }

  // Between a dense [N, H, W] and the thread's pixels; what does not exist is read as 0.
  template <class T, class V>
  __device__ __forceinline__ void load_map(const TensorView& view, V (&values)[P]) const {
#pragma unroll
    for (int i = 0; i < P; ++i) values[i] = V(0);
    load_some(at<const T>(view, map), map_step, values);
  }
  template <class T, class V>
  __device__ __forceinline__ void store_map(const TensorView& view, const V (&values)[P]) const {
    T* to = at<T>(view, map);
    if constexpr (kTakesVectors) {
      Pack<T, P> pack;
#pragma unroll
      for (int i = 0; i < P; ++i) pack.values[i] = static_cast<T>(values[i]);
      if (count > 0) store_pack(to, pack);
    } else {
#pragma unroll
      for (int i = 0; i < P; ++i, to += map_step) {
        if (i < count) *to = static_cast<T>(values[i]);
      }
    }
  }
  // A class index (runner-up, prediction) is kept in its own small type.
  __device__ __forceinline__ void load_classes(const TensorView& view, int32_t (&values)[P]) const {
    if (view.dtype == DType::kUInt8) {
      load_map<uint8_t>(view, values);
    } else {
      load_map<int16_t>(view, values);
    }
  }
  __device__ __forceinline__ void store_classes(const TensorView& view, const int32_t (&values)[P]) const {
    if (view.dtype == DType::kUInt8) {
      store_map<uint8_t>(view, values);
    } else {
      store_map<int16_t>(view, values);
    }
  }

  // Calls f(c, z) with the logits of each class.
  template <class F>
  __device__ __forceinline__ void for_each_logit(int32_t classes, F&& f) const {
#pragma unroll kUnroll
    for (int32_t c = 0; c < classes; ++c) {
      A z[P];
      load(c, z);
      f(c, z);
    }
  }

  // Stores the gradients of all classes, where the logits have the labels' size: f(c, z, g) sets those of one class, g,
  // from its logits z (kReads; else it gets none). Backwards: where the cache does not hold all logits of the blocks at
  // work, it holds those read last.
  template <bool kReads, class F>
  __device__ __forceinline__ void store_gradient(const TensorView& grad, int32_t classes, F&& f) const {
    static_assert(!kUp);
    const int64_t stride = grad.stride[1];
    S* to = at<S>(grad, offset(grad, 2) + scaled(classes - 1, stride));
    const auto store = [&](int32_t c, const Pack<S, P>& logits) {
      A z[P], g[P];
#pragma unroll
      for (int i = 0; i < P; ++i) z[i] = to_compute(logits.values[i]);
      f(c, z, g);
      Pack<S, P> pack;
#pragma unroll
      for (int i = 0; i < P; ++i) pack.values[i] = from_compute<S>(g[i]);
      if (count > 0) store_pack_once(to, pack);  // the logits may be read a second time
      to -= stride;
    };
    int32_t c = classes - 1;
    if constexpr (kReads) {
      // Several classes are loaded before the first one is stored. The compiler moves no load ahead of a store, and one
      // under way for each thread would not keep the memory busy.
      const S* from = tap[0] + scaled(c, stride_c);
      for (; c >= kUnroll - 1; c -= kUnroll) {
        Pack<S, P> logits[kUnroll];
#pragma unroll
        for (int j = 0; j < kUnroll; ++j, from -= stride_c) logits[j] = load_pack<P>(from);
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) store(c - j, logits[j]);
      }
#pragma unroll 1
      for (; c >= 0; --c, from -= stride_c) store(c, load_pack<P>(from));
    } else {
#pragma unroll kUnroll
      for (; c >= 0; --c) store(c, {});
    }
  }
};

// The pixel of one thread, where logits (and their gradient) of the labels' size have the classes as neighbours.
//
// Class by class the lanes of a warp would touch as many sectors of 32 bytes as there are pixels, again and again: 8
// times the fewest bytes in float32, 16 times in half precision. So a warp moves up to 128 bytes of the classes of its
// 32 pixels together, and each lane finds its own pixel's in shared memory; gradients take the places of the logits
// there. Where all of it lies together, it moves 16 bytes at a time (Walk::dense). All lanes must call both functions.
//
// Expected, from the compiler's report (sm_90) and counted as in tests/traffic.py, not measured: 1.1 times the fewest
// bytes with 19 classes and dense pixels, 1.2 (float32) or 1.5 (half precision) with 150; 17 KB of shared memory for a
// block; 48 to 80 registers, 37 to 62 % occupancy; 10 to 13 instructions for a class of a pixel, and 1 or 2 (dense),
// else 7, to bring it, as many again to store it.
template <class S>
struct ChannelsLast : Pixels<S, 1, false> {
  using A = Compute<S>;
  static constexpr int kWidth = 128 / static_cast<int>(sizeof(S));       // most classes in shared memory
  static constexpr int kRow = kWidth + 4 / static_cast<int>(sizeof(S));  // rows begin in different banks
  static constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(S));

  bool dense;
  int32_t exist;        // pixels of the warp that do, 0 ... 32
  int64_t begin;        // the first of them
  const TensorView& logits;
  mutable int32_t held = -1;  // the first class of the logits in shared memory

  __device__ __forceinline__ ChannelsLast(const Problem& problem, const Walk& walk)
      : Pixels<S, 1, false>(problem, walk), dense(walk.dense), logits(problem.logits) {
    const uint32_t block = blockIdx.x - static_cast<uint32_t>(this->n) * static_cast<uint32_t>(walk.blocks.value);
    begin = int64_t{block} * kThreads + threadIdx.x / kWarp * kWarp;
    const int64_t left = walk.items - begin;
    exist = left <= 0 ? 0 : (left < kWarp ? static_cast<int32_t>(left) : kWarp);
  }

  // Not where more than four lanes would find their logits in the same bank.
  static bool can_be_dense(const TensorView& view) {
    if (view.data == nullptr) return true;
    const int64_t classes = view.size[1], bytes = sizeof(S);
    const bool aligned = is_aligned(view) && (view.size[0] <= 1 || view.stride[0] * bytes % kVectorBytes == 0);
    return aligned && view.stride[3] == classes && classes <= kWidth && classes * bytes % 32 != 0;
  }

  template <class F>
  __device__ __forceinline__ void for_each_logit(int32_t classes, F&& f) const {
    const S* own = row(classes);
    for (int32_t first = 0; first < classes; first += kWidth) {
      const int32_t width = classes - first < kWidth ? classes - first : kWidth;
      load(first, width);
#pragma unroll 4
      for (int32_t i = 0; i < width; ++i) {
        A z[1] = {to_compute(own[i])};
        f(first + i, z);
      }
    }
  }

  template <bool kReads, class F>
  __device__ __forceinline__ void store_gradient(const TensorView& grad, int32_t classes, F&& f) const {
    S* own = row(classes);
    for (int32_t first = (classes - 1) / kWidth * kWidth; first >= 0; first -= kWidth) {
      const int32_t width = classes - first < kWidth ? classes - first : kWidth;
      if constexpr (kReads) load(first, width);
#pragma unroll 4
      for (int32_t i = width - 1; i >= 0; --i) {
        A z[1] = {}, g[1];
        if constexpr (kReads) z[0] = to_compute(own[i]);
        f(first + i, z, g);
        own[i] = from_compute<S>(g[0]);
      }
      held = -1;
      __syncwarp();
      store(grad, first, width);
      __syncwarp();  // until the next gradients come
    }
  }

 private:
  static __device__ __forceinline__ int32_t lane() { return static_cast<int32_t>(threadIdx.x % kWarp); }

  static __device__ __forceinline__ S* shared() {
    alignas(kVectorBytes) __shared__ S of_block[kThreads * kRow];
    return of_block + threadIdx.x / kWarp * (kWarp * kRow);
  }
  // The classes of this lane's pixel.
  __device__ __forceinline__ S* row(int32_t classes) const { return shared() + lane() * (dense ? classes : kRow); }

  __device__ __forceinline__ S* first_pixel(const TensorView& view) const {
    return at<S>(view, scaled(this->n, view.stride[0]) + scaled(begin, view.stride[3]));
  }

  // Brings the logits of `width` classes of all pixels. What does not exist is 0.
  __device__ __forceinline__ void load(int32_t first, int32_t width) const {
    if (held == first) return;
    held = first;
    __syncwarp();  // until every lane has read the former ones
    if (lane() >= exist) {
      S* own = row(width);
      for (int32_t i = 0; i < width; ++i) own[i] = S{};
    }
    const S* from = first_pixel(logits);
    S* to = shared();
    if (dense) {
      move_together<4>(from, to, exist * width);
    } else {
      move_rows<8>(from + first, static_cast<int32_t>(logits.stride[3]), to, kRow, width);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void store(const TensorView& grad, int32_t first, int32_t width) const {
    S* to = first_pixel(grad);
    if (dense) {
      move_together<1>(shared(), to, exist * width);
    } else {
      move_rows<1>(shared(), kRow, to + first, static_cast<int32_t>(grad.stride[3]), width);
    }
  }

  // kAtOnce: how many are loaded before the first one is waited for.
  template <int kAtOnce>
  static __device__ __forceinline__ void move_together(const S* from, S* to, int32_t count) {
    using Words = Pack<uint32_t, 4>;  // of elements of two bytes the compiler would make words anew
    const Words* source = reinterpret_cast<const Words*>(from);
    Words* target = reinterpret_cast<Words*>(to);
    const int32_t whole = count / kVector;
    for (int32_t i = lane(); i < whole;) {
      Words words[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (i + j * kWarp < whole) words[j] = source[i + j * kWarp];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j, i += kWarp) {
        if (i < whole) target[i] = words[j];
      }
    }
    // At the end of an image.
    for (int32_t i = whole * kVector + lane(); i < count; i += kWarp) to[i] = from[i];
  }

  // `width` elements of each pixel, whose rows begin `stride_from` and `stride_to` apart. Neighbouring lanes take
  // neighbours, of as many pixels as there are lanes for.
  template <int kAtOnce>
  __device__ __forceinline__ void move_rows(const S* from, int32_t stride_from, S* to, int32_t stride_to,
                                            int32_t width) const {
    const int32_t step = width < kWarp ? kWarp / width : 1, first = lane() / width;
    if (width < kWarp && first >= step) return;  // left over
    for (int32_t k = width < kWarp ? lane() % width : lane(); k < width; k += kWarp) {
      int32_t pixel = width < kWarp ? first : 0;
      const S* source = from + (pixel * stride_from + k);
      S* target = to + (pixel * stride_to + k);
      while (pixel < exist) {
        S value[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (pixel + j * step < exist) value[j] = *source;
          source += step * stride_from;
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (pixel < exist) *target = value[j];
          target += step * stride_to;
          pixel += step;
        }
      }
    }
  }
};

// The largest logit of each pixel, and its class; with kMargin without the pixel's label, whose logit is `own` then (0
// where not valid). All threads of a warp must call it.
//
// In a column of pixels most classes need no look at the pixels: a pixel's logit is a mean of both rows', and rounding
// keeps the order of numbers (equal ones may result), so a class whose larger row lies below the smaller row of another
// class before it takes no place from that one; for margins of two, as one may be the label. The results are the same
// to the bit. A warp looks where one of its threads must: of the smooth logits in benchmarks/cases.py at 45 % (margin)
// or 30 % of 19 classes, at 16 or 10 % of 150, of noise at nearly all.
template <bool kMargin, class Mine, int P = Mine::kPixels, class A = typename Mine::A>
__device__ __forceinline__ void find_largest(const Mine& pixels, int32_t classes, const int32_t (&label)[P],
                                             A (&own)[P], A (&best)[P], int32_t (&best_class)[P]) {
  const auto begin = [&] {
#pragma unroll
    for (int i = 0; i < P; ++i) {
      own[i] = A(0);
      best[i] = -kInfinity<A>;
      best_class[i] = kMargin ? lowest_other_class(label[i]) : 0;
    }
  };
  const auto compare = [&](int32_t c, int i, A z, bool takes) {
    if constexpr (kMargin) takes &= label[i] != c;
    best[i] = takes ? z : best[i];
    best_class[i] = takes ? c : best_class[i];
  };
  begin();
  if constexpr (!Mine::kIsColumn) {
    pixels.for_each_logit(classes, [&](int32_t c, const A (&z)[P]) {
#pragma unroll
      for (int i = 0; i < P; ++i) {
        if constexpr (kMargin) own[i] = label[i] == c ? z[i] : own[i];
        compare(c, i, z[i], beats(z[i], best[i]));
      }
    });
  } else {
    // With an index of 32 bits the compiler keeps c - label of every pixel, and counts them all up.
    using Index = std::conditional_t<kMargin, int64_t, int32_t>;
    A first = -kInfinity<A>, second = first;  // the two largest of the smaller rows so far
    A sum = 0;
    pixels.template for_each_class<Index>(0, classes, [&](int32_t c, auto rows) {
      sum += std::fabs(rows.upper);
      sum += std::fabs(rows.lower);
      const A smaller = std::fmin(rows.upper, rows.lower), larger = std::fmax(rows.upper, rows.lower);
      const bool is_below = larger < (kMargin ? second : first);
      second = std::fmax(second, std::fmin(first, smaller));
      first = std::fmax(first, smaller);
      if (__all_sync(kAllLanes, is_below)) return;
#pragma unroll
      for (int i = 0; i < P; ++i) {
        const A z = pixels.between(rows, i);
        compare(c, i, z, z > best[i]);
      }
    });
    // Perhaps not all finite: a pixel may be NaN, which takes more than one comparison.
    if (!(sum < kInfinity<A>)) {
      begin();
      pixels.template for_each_class<Index>(0, classes, [&](int32_t c, auto rows) {
#pragma unroll
        for (int i = 0; i < P; ++i) {
          const A z = pixels.between(rows, i);
          compare(c, i, z, beats(z, best[i]));
        }
      });
    }
    if constexpr (kMargin) pixels.load_own(label, own);
  }
}

// Leaves the block's sums. All threads of the block must call it.
__device__ __forceinline__ void store_partial(Partial* partial, double sum0, double sum1, int32_t counts) {
  if (threadIdx.x == 0) partial[blockIdx.x] = {sum0, sum1, counts & 0xffff, counts >> 16};
}

// --- host ---

inline bool resamples(const Problem& problem) {
  return problem.logits.size[2] != problem.labels.size[1] || problem.logits.size[3] != problem.labels.size[2];
}

// Whether logits, or their gradient, are channels_last, with an offset in 32 bits for the pixels of a warp.
inline bool classes_are_neighbours(const TensorView& view) {
  return view.data == nullptr || (view.stride[1] == 1 && view.stride[3] < (1 << 24));
}

// Whether all rows begin at a multiple of `vector` elements and their elements are neighbours.
inline bool rows_are_vectors(const TensorView& view, int dims, int vector) {
  if (view.data == nullptr) return true;
  bool result = is_aligned(view) && view.stride[dims - 1] == 1;
  for (int d = 0; d < dims - 1; ++d) result = result && (view.size[d] <= 1 || view.stride[d] % vector == 0);
  return result;
}

inline Error too_wide() { return {1, "resampling", "an image is too large: a side of about 2^26 pixels or more"}; }

inline Walk walk_of(int64_t rows, int64_t columns, int64_t across, int64_t items) {
  Walk walk{};
  walk.rows = rows, walk.columns = columns, walk.items = items;
  walk.across = Divisor(across);
  walk.blocks = Divisor(ceil_div(items, kThreads));
  return walk;
}

// Calls f(TypeTag<Pixels>{}, walk) with the walk that fits. `map`: a further input [N, H, W] of any strides, or none.
// may_take_vectors: whether dense maps [N, H, W] begin at multiples of 16 bytes.
template <class F>
Error dispatch_pixels(const Problem& problem, const TensorView& map, bool may_take_vectors, F&& f) {
  return dispatch_floating(problem.logits.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const TensorView &logits = problem.logits, &labels = problem.labels, &grad = problem.grad;
    const int64_t H = labels.size[1], W = labels.size[2];
    if (resamples(problem)) {
      const Axis y = make_axis(logits.size[2], H, problem.align_corners);
      const Axis x = make_axis(logits.size[3], W, problem.align_corners);
      if (!y.is_narrow() || !x.is_narrow()) return too_wide();
      const int64_t most = y.most_outputs();
      const bool quad_rows = most >= kColumn / 2;
      const int64_t chunks = quad_rows ? ceil_div(most, kColumn) : 1;
      Walk walk = walk_of(H, W, W, W * (quad_rows ? (y.in + 1) * chunks : H));
      walk.y = y, walk.x = x, walk.chunks = Divisor(chunks);
      if (quad_rows && most > kColumn / 2) return f(TypeTag<Pixels<S, kColumn, true>>{}, walk);
      if (quad_rows) return f(TypeTag<Pixels<S, kColumn / 2, true>>{}, walk);
      return f(TypeTag<Pixels<S, 1, true>>{}, walk);
    }
    const bool join = rows_join(logits, 2) && rows_join(labels, 1) && rows_join(grad, 2) && rows_join(map, 1);
    const int64_t rows = join ? 1 : H, columns = join ? H * W : W;
    if constexpr (sizeof(S) < 8) {
      if (join && classes_are_neighbours(logits) && classes_are_neighbours(grad)) {
        Walk walk = walk_of(rows, columns, columns, columns);
        walk.dense = ChannelsLast<S>::can_be_dense(logits) && ChannelsLast<S>::can_be_dense(grad);
        return f(TypeTag<ChannelsLast<S>>{}, walk);
      }
    }
    constexpr int V = kVector<S>;
    const bool vectors = V > 1 && may_take_vectors && columns % V == 0 && rows_are_vectors(logits, 4, V) &&
                         rows_are_vectors(labels, 3, V) && rows_are_vectors(grad, 4, V);
    if (vectors) return f(TypeTag<Pixels<S, V, false>>{}, walk_of(rows, columns, columns / V, rows * (columns / V)));
    return f(TypeTag<Pixels<S, 1, false>>{}, walk_of(rows, columns, columns, rows * columns));
  });
}

// What `finish` writes. NaN goes wherever a floating result belongs to an image with a bad label.
struct Results {
  TensorView sum0, sum1, n_valid;  // [N]
  TensorView map;                  // [N, H, W], dense, of the compute type
  TensorView grad;                 // [N, C, h, w], dense in some order
};

inline bool maps_are_aligned() { return true; }
template <class... Views>
bool maps_are_aligned(const TensorView& view, const Views&... views) {
  return is_aligned(view) && maps_are_aligned(views...);
}

// Adds up what the `blocks` blocks of every image left.
template <class S>
Error finish(const Results& results, int64_t n, const Partial* partial, int32_t blocks, int64_t stream);

}  // namespace segadv::cuda
