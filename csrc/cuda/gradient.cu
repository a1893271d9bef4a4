// The gradient of the losses with respect to the logits, from what the forward kept of every pixel.
//
// gradient_kernel, logits of the labels' size: every class of every pixel once. Fewest bytes: the gradient written
// once, and for cross-entropy the logits read once. Bound by memory.
//
// resampled_gradient_kernel: the transpose of the resampling without atomics. A lane owns a column of quads (the output
// pixels between four neighbouring taps, common/bilinear.h) for a few classes, and walks down: over the pixels of a
// quad it adds up four corner sums; two of them complete the row of logits above, two are carried to the row below.
// Along x the sums of neighbouring lanes meet once per quad, in a shuffle. Nothing of C classes is ever larger than the
// gradient itself. The quad row at the upper edge of a warp's rows, and one column of quads in 32, are computed twice.
// Bound by arithmetic: 6 (margin) or 9 (cross-entropy, with one exponential) operations per class and pixel.
//
// Expected, from the compiler's report (nvcc 13.0, sm_90, float32) and arithmetic, not measured: at full resolution 30
// (margin) or 40 registers, 100 % or 75 % occupancy; with 19 classes 76 bytes per pixel for a margin, 152 for
// cross-entropy, besides labels and maps. Resampled: 121 registers, 25 %. Fraction of the limit reached: not yet
// measured.
#include "cuda/gradient.cuh"

namespace segadv::cuda {
namespace {

__device__ __forceinline__ int64_t load_integer(const TensorView& view, int64_t offset) {
  switch (view.dtype) {
    case DType::kInt64: return *at<const int64_t>(view, offset);
    case DType::kInt32: return *at<const int32_t>(view, offset);
    case DType::kInt16: return *at<const int16_t>(view, offset);
    default: return *at<const uint8_t>(view, offset);
  }
}

// What a pixel's gradient is multiplied with: incoming gradient, weight of its class, weight of the pixel.
template <class A>
__device__ __forceinline__ A load_value(const GradientInputs& inputs, int64_t at_loss, int64_t map, int32_t label) {
  A value = 1;
  if (inputs.grad_loss.data != nullptr) value *= *at<const A>(inputs.grad_loss, at_loss);
  if (inputs.class_weight.data != nullptr) value *= *at<const A>(inputs.class_weight, label > 0 ? label : 0);
  if (inputs.pixel_weight.data != nullptr) value *= *at<const A>(inputs.pixel_weight, map);
  return value;
}

// kMargin: margins; otherwise cross-entropy.
template <class S, int P, bool kMargin>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Problem problem, GradientInputs inputs, Walk walk, Partial* partial) {
  using Mine = Pixels<S, P, false>;
  using A = Compute<S>;
  const Mine pixels(problem, walk);
  int32_t label[P], runner_up[P];
  const int32_t counts = pixels.labels(problem, label);
  A value[P], largest[P], scale[P];
#pragma unroll
  for (int i = 0; i < P; ++i) {
    const int64_t at_loss = pixels.offset(inputs.grad_loss) + i * pixels.step(inputs.grad_loss);
    value[i] = i < pixels.count ? load_value<A>(inputs, at_loss, pixels.map + i, label[i]) : A(0);
  }
  if constexpr (kMargin) {
    pixels.load_classes(inputs.runner_up, runner_up);
#pragma unroll
    for (int i = 0; i < P; ++i) runner_up[i] = label[i] >= 0 ? runner_up[i] : -1;
  } else {
    pixels.template load_map<A>(inputs.largest, largest);
    pixels.template load_map<A>(inputs.log_normalizer, scale);
#pragma unroll
    for (int i = 0; i < P; ++i) scale[i] = value[i] * exp_nonpositive(-scale[i]);
  }
  const int32_t classes = static_cast<int32_t>(problem.logits.size[1]);
#pragma unroll Mine::kUnroll
  for (int32_t c = 0; c < classes; ++c) {
    A g[P];
    if constexpr (kMargin) {
#pragma unroll
      for (int i = 0; i < P; ++i) g[i] = margin_gradient(c, label[i], runner_up[i], value[i]);
    } else {
      A z[P];
      pixels.load(c, z);
#pragma unroll
      for (int i = 0; i < P; ++i) g[i] = cross_entropy_gradient(c, label[i], z[i], largest[i], scale[i], value[i]);
    }
    pixels.store_gradient(problem.grad, c, g);
  }
  store_partial(partial, 0, 0, block_sum(counts));
}

// How the gradient of resampled logits is dealt out to warps: lanes along x, then classes, x, y.
struct Warps {
  Axis y, x;
  int32_t rows;                     // of logits, of a warp
  int32_t tiles_c, tiles_x, count;  // count: of an image
};

constexpr int kQuads = kWarp - 1;  // the last lane's quad only completes the column of the lane before it

template <bool kMargin>
constexpr int kClasses = kMargin ? 8 : 4;  // of a warp, as many as the registers hold

template <class S, bool kMargin>
__global__ void __launch_bounds__(kThreads)
    resampled_gradient_kernel(Problem problem, GradientInputs inputs, Warps warps, Partial* partial) {
  using A = Compute<S>;
  constexpr int K = kClasses<kMargin>;
  const int32_t blocks = (warps.count + kThreads / kWarp - 1) / (kThreads / kWarp);
  const int64_t n = blockIdx.x / blocks;
  const int32_t warp = blockIdx.x % blocks * (kThreads / kWarp) + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const TensorView &logits = problem.logits, &labels = problem.labels, &grad = problem.grad;
  const int64_t h = warps.y.in, w = warps.x.in, H = warps.y.out, W = warps.x.out;
  const int32_t classes = static_cast<int32_t>(logits.size[1]);
  const int32_t first_class = warp % warps.tiles_c * K;
  const int64_t quad_x = int64_t{warp / warps.tiles_c % warps.tiles_x} * kQuads + lane;
  const int64_t row = int64_t{warp / warps.tiles_c / warps.tiles_x} * warps.rows;
  const int64_t last_row = row + warps.rows < h ? row + warps.rows : h;  // a warp too many has no row at all

  const int64_t begin_x = warps.x.first_output(quad_x), end_x = warps.x.first_output(quad_x + 1);
  const QuadWeights<A> weights_x(warps.x, quad_x);
  const int64_t rest_x = warps.x.rest(begin_x, quad_x);
  const int64_t left = quad_x > 0 ? (quad_x < w ? quad_x - 1 : w - 1) : 0, right = quad_x < w ? quad_x : w - 1;
  int32_t counts = 0;

  // Corner sums for the row of logits that the next quad row completes.
  A lower_left[K]{}, lower_right[K]{};
  for (int64_t quad_y = row; quad_y <= last_row; ++quad_y) {
    A upper_left[K], upper_right[K], z00[K], z01[K], z10[K], z11[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      upper_left[k] = lower_left[k], upper_right[k] = lower_right[k];
      lower_left[k] = lower_right[k] = A(0);
      if constexpr (!kMargin) {
        const int64_t c = first_class + k < classes ? first_class + k : classes - 1;
        const S* plane = at<const S>(logits, n * logits.stride[0] + c * logits.stride[1]);
        const S* upper = plane + (quad_y > 0 ? quad_y - 1 : 0) * logits.stride[2];
        const S* lower = plane + (quad_y < h ? quad_y : h - 1) * logits.stride[2];
        z00[k] = to_compute(upper[left * logits.stride[3]]), z01[k] = to_compute(upper[right * logits.stride[3]]);
        z10[k] = to_compute(lower[left * logits.stride[3]]), z11[k] = to_compute(lower[right * logits.stride[3]]);
      }
    }
    const int64_t begin_y = warps.y.first_output(quad_y), end_y = warps.y.first_output(quad_y + 1);
    const QuadWeights<A> weights_y(warps.y, quad_y);
    for (int64_t y = begin_y; y < end_y; ++y) {
      const A wy1 = weights_y.w1(warps.y.rest(y, quad_y)), wy0 = A(1) - wy1;
      const int64_t row_labels = n * labels.stride[0] + y * labels.stride[1];
      const int64_t row_loss = n * inputs.grad_loss.stride[0] + y * inputs.grad_loss.stride[1];
      const int64_t row_map = (n * H + y) * W;
      A sum_left[K]{}, sum_right[K]{}, z0[K], z1[K];
      if constexpr (!kMargin) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          z0[k] = wy0 * z00[k] + wy1 * z10[k];
          z1[k] = wy0 * z01[k] + wy1 * z11[k];
        }
      }
      int64_t rest = rest_x;
      for (int64_t x = begin_x; x < end_x; ++x, rest += warps.x.step) {
        const A wx1 = weights_x.w1(rest), wx0 = A(1) - wx1;
        const Label found = judge(problem, load_integer(labels, row_labels + x * labels.stride[2]));
        const int32_t label = found.label;
        counts += found.is_bad ? 1 << 16 : 0;
        const A value = load_value<A>(inputs, row_loss + x * inputs.grad_loss.stride[2], row_map + x, label);
        int32_t runner_up = -1;
        A largest = 0, scale = 0;
        if constexpr (kMargin) {
          if (label >= 0) runner_up = static_cast<int32_t>(load_integer(inputs.runner_up, row_map + x));
        } else {
          largest = *at<const A>(inputs.largest, row_map + x);
          scale = value * exp_nonpositive(-*at<const A>(inputs.log_normalizer, row_map + x));
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
          A g;
          if constexpr (kMargin) {
            g = margin_gradient(first_class + k, label, runner_up, value);
          } else {
            const A z = wx0 * z0[k] + wx1 * z1[k];
            g = cross_entropy_gradient(first_class + k, label, z, largest, scale, value);
          }
          sum_left[k] += wx0 * g;
          sum_right[k] += wx1 * g;
        }
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        upper_left[k] += wy0 * sum_left[k], upper_right[k] += wy0 * sum_right[k];
        lower_left[k] += wy1 * sum_left[k], lower_right[k] += wy1 * sum_right[k];
      }
    }
    if (quad_y > row) {
      const int64_t to = n * grad.stride[0] + (quad_y - 1) * grad.stride[2] + quad_x * grad.stride[3];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        // Column i: the right corner of quad i and the left one of quad i + 1.
        const A g = upper_right[k] + __shfl_down_sync(kAllLanes, upper_left[k], 1);
        if (lane < kQuads && quad_x < w && first_class + k < classes)
          *at<S>(grad, to + (first_class + k) * grad.stride[1]) = from_compute<S>(g);
      }
    }
  }
  counts = block_sum(counts > 0 ? 1 << 16 : 0);
  if (partial != nullptr) store_partial(partial, 0, 0, counts);
}

// Few warps leave a GPU idle, few rows are computed half in vain.
constexpr int64_t kWarpsWanted = 2048;
constexpr int32_t kMostRows = 8, kFewestRows = 2;

Warps warps_of(int64_t n, int64_t classes, const Axis& y, const Axis& x, int classes_of_warp) {
  Warps warps{};
  warps.y = y, warps.x = x;
  warps.tiles_c = static_cast<int32_t>(ceil_div(classes, classes_of_warp));
  warps.tiles_x = static_cast<int32_t>(ceil_div(x.in, kQuads));
  const int64_t across = int64_t{warps.tiles_c} * warps.tiles_x;
  warps.rows = kMostRows;
  while (warps.rows > kFewestRows && n * across * ceil_div(y.in, warps.rows) < kWarpsWanted) warps.rows /= 2;
  warps.count = static_cast<int32_t>(across * ceil_div(y.in, warps.rows));
  return warps;
}

int32_t blocks_of(const Warps& warps) { return static_cast<int32_t>(ceil_div(warps.count, kThreads / kWarp)); }

template <class S>
Error launch_resampled(const Problem& problem, const GradientInputs& inputs, Partial* partial, int32_t* blocks,
                       int64_t stream) {
  const TensorView &logits = problem.logits, &labels = problem.labels;
  const bool margin = inputs.margin;
  const Warps warps =
      warps_of(logits.size[0], logits.size[1], make_axis(logits.size[2], labels.size[1], problem.align_corners),
               make_axis(logits.size[3], labels.size[2], problem.align_corners),
               margin ? kClasses<true> : kClasses<false>);
  *blocks = blocks_of(warps);
  const auto kernel = margin ? resampled_gradient_kernel<S, true> : resampled_gradient_kernel<S, false>;
  return launch("resampled_gradient", kernel, logits.size[0] * *blocks, stream, problem, inputs, warps, partial);
}

}  // namespace

Error resampled_gradient(const Problem& problem, const GradientInputs& inputs, int64_t stream) {
  return dispatch_floating(problem.logits.dtype, [&](auto tag) {
    int32_t blocks;
    return launch_resampled<typename decltype(tag)::type>(problem, inputs, nullptr, &blocks, stream);
  });
}

Error gradient(const Problem& problem, const GradientInputs& inputs, void* workspace, int64_t stream) {
  const int64_t n = problem.logits.size[0];
  Partial* partial = static_cast<Partial*>(workspace);
  const Results results{{}, {}, {}, {}, problem.grad};
  if (resamples(problem)) {
    return dispatch_floating(problem.logits.dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      int32_t blocks;
      if (const Error error = launch_resampled<S>(problem, inputs, partial, &blocks, stream)) return error;
      return finish<S>(results, n, partial, blocks, stream);
    });
  }
  const bool aligned = maps_are_aligned(inputs.runner_up, inputs.largest, inputs.log_normalizer);
  return dispatch_pixels(problem, inputs.grad_loss, aligned, [&](auto tag, const Walk& walk) -> Error {
    using Mine = typename decltype(tag)::type;
    using S = typename Mine::Storage;
    if constexpr (Mine::kResamples) {
      return {};  // above
    } else {
      const auto kernel =
          inputs.margin ? gradient_kernel<S, Mine::kPixels, true> : gradient_kernel<S, Mine::kPixels, false>;
      const int64_t blocks = n * walk.blocks;
      if (const Error error = launch("gradient", kernel, blocks, stream, problem, inputs, walk, partial)) return error;
      return finish<S>(results, n, partial, walk.blocks, stream);
    }
  });
}

int64_t pixel_workspace(int64_t N, int64_t C, int64_t h, int64_t w, int64_t H, int64_t W, bool align_corners) {
  if (h == H && w == W) return N * ceil_div(H * W, kThreads) * sizeof(Partial);
  const Axis y = make_axis(h, H, align_corners), x = make_axis(w, W, align_corners);
  const int64_t rows = (h + 1) * ceil_div(y.most_outputs(), kColumn);
  const int64_t forward = ceil_div(W * (rows > H ? rows : H), kThreads);
  // Fewer classes of a warp are more warps, but with fewer warps across there may be more rows of them.
  const int64_t margin = blocks_of(warps_of(N, C, y, x, kClasses<true>));
  const int64_t losses = blocks_of(warps_of(N, C, y, x, kClasses<false>));
  const int64_t backward = margin > losses ? margin : losses;
  return N * (forward > backward ? forward : backward) * sizeof(Partial);
}

}  // namespace segadv::cuda
