// The gradient of the losses with respect to the logits, from what the forward kept of every pixel.
//
// gradient_kernel, logits of the labels' size: every class of every pixel once. Fewest bytes: the gradient written
// once, and for cross-entropy the logits read once. Bound by memory.
//
// resampled_gradient_kernel: the transpose of the resampling without atomics. Between two rows of logits lies a row of
// quads (common/bilinear.h). A thread owns a column of its pixels, with all that they need in registers, and goes
// through the classes: what its pixels add to the row above, and below, stays in shared memory (for margins, which have
// two classes that count, nothing else is touched). Then a thread owns logits, and adds up the columns of the quads
// left and right of each. A block walks down: what goes below waits for the next row of quads. Nothing of C classes is
// ever larger than the gradient itself; the row of quads at a block's upper edge, and one column of them, are computed
// twice. Bound by arithmetic.
//
// Expected, from the compiler's report (nvcc 13.0, sm_90, float32) and arithmetic, not measured: at full resolution 40
// (margin) or 48 registers, 75 % or 62 % occupancy; with 19 classes 76 bytes per pixel for a margin, 152 for
// cross-entropy, besides labels and maps; four loads of 16 bytes of a thread under way, on a multiprocessor of H100 or
// H200 80 KB, where bandwidth times latency (0.7 us) asks for 9 to 13 KB of reads. Resampled, eightfold: cross-entropy
// takes about 105 instructions for a class of 8 pixels, 150 where it may be one's label; a class of a logit, which
// gathers 16 columns, about 130; a column's beginning and end about 500. That is some 20 per class and pixel, with 19
// classes, and for a margin 7. 117 registers, 25 % (margin: 88, 31 %). Fraction of the limit reached: not yet measured.
#include <type_traits>

#include "cuda/gradient.cuh"

namespace segadv::cuda {
namespace {

// What the gradients of a thread's pixels are multiplied with: incoming gradient, weight of the class, weight of the
// pixel; 0 where not valid.
template <class Mine, int P = Mine::kPixels, class A = typename Mine::A>
__device__ __forceinline__ void load_values(const GradientInputs& inputs, const Mine& pixels, const int32_t (&label)[P],
                                            A (&value)[P]) {
#pragma unroll
  for (int i = 0; i < P; ++i) value[i] = label[i] >= 0 ? A(1) : A(0);
  if (inputs.grad_loss.data != nullptr) {
    const A* from = at<const A>(inputs.grad_loss, pixels.offset(inputs.grad_loss));
    const int64_t between = pixels.step(inputs.grad_loss);
#pragma unroll
    for (int i = 0; i < P; ++i, from += between) {
      if (label[i] >= 0) value[i] = *from;
    }
  }
  if (inputs.class_weight.data != nullptr) multiply_by_class_weight(inputs.class_weight, pixels, label, value);
  if (inputs.pixel_weight.data != nullptr) {
    A weight[P];
    pixels.template load_map<A>(inputs.pixel_weight, weight);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      if (label[i] >= 0) value[i] *= weight[i];
    }
  }
}

// kMargin: margins; otherwise cross-entropy.
template <class Mine, bool kMargin>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Problem problem, GradientInputs inputs, Walk walk, Partial* partial) {
  using A = typename Mine::A;
  constexpr int P = Mine::kPixels;
  const Mine pixels(problem, walk);
  int32_t label[P], runner_up[P];
  const int32_t counts = pixels.labels(problem, label);
  A value[P], shift[P], factor[P];
  load_values(inputs, pixels, label, value);
  if constexpr (kMargin) {
    pixels.load_classes(inputs.runner_up, runner_up);
#pragma unroll
    for (int i = 0; i < P; ++i) runner_up[i] = label[i] >= 0 ? runner_up[i] : -1;
  } else {
    pixels.template load_map<A>(inputs.shift, shift);
    pixels.template load_map<A>(inputs.scale, factor);
#pragma unroll
    for (int i = 0; i < P; ++i) factor[i] *= value[i];
  }
  const int32_t classes = static_cast<int32_t>(problem.logits.size[1]);
  pixels.template store_gradient<!kMargin>(problem.grad, classes, [&](int32_t c, const A (&z)[P], A (&g)[P]) {
#pragma unroll
    for (int i = 0; i < P; ++i) {
      if constexpr (kMargin) {
        g[i] = margin_gradient(c, label[i], runner_up[i], value[i]);
      } else {
        g[i] = cross_entropy_gradient(c, label[i], z[i], shift[i], factor[i], value[i]);
      }
    }
  });
  store_partial(partial, 0, 0, block_sum(counts));
}

// How the gradient of resampled logits is dealt out to blocks: classes, then logits along x, then along y.
struct Patches {
  Axis y, x;
  int32_t rows, columns, classes;   // of logits, of a block
  int32_t tiles_c, tiles_x, count;  // blocks; count: of an image
};

template <class A>
constexpr int kTile = 96 / static_cast<int>(sizeof(A));  // most classes of a block; shared memory has to hold them
constexpr int kQuads = 32;                               // most quads of a block along x
// Columns of pixels. The slot behind a quad stays free, so that neighbouring quads of 8 are not in the same bank.
constexpr int kSlots = kThreads + kQuads;

// What a column of pixels adds to the row of logits above and below it.
template <class A>
struct alignas(2 * sizeof(A)) Ends {
  A upper, lower;
};

// What a column of pixels of one quad adds, class by class, to the rows of logits above and below: ends[c * kSlots].
// Returns whether a label is bad.
template <bool kMargin, class S, int P>
__device__ __forceinline__ int32_t column_gradient(const Problem& problem, const GradientInputs& inputs,
                                                   const Pixels<S, P, true>& pixels, int32_t quad_y, int32_t h,
                                                   int32_t first_class, int32_t classes, Ends<Compute<S>>* ends) {
  using A = Compute<S>;
  int32_t label[P];
  const int32_t counts = pixels.labels(problem, label);
  A value[P];
  load_values(inputs, pixels, label, value);
  const auto of_lower = [&](int i, A of_both) { return transposed(pixels.wy1[i], quad_y, h) * of_both; };
  if constexpr (kMargin) {
    // To the class alone, without a look at the others.
    const auto add_to = [&](int32_t c, A to_upper, A to_lower) {
      c -= first_class;
      if (c < 0 || c >= classes) return;
      ends[c * kSlots].upper += to_upper;
      ends[c * kSlots].lower += to_lower;
    };
    int32_t runner_up[P];
    pixels.load_classes(inputs.runner_up, runner_up);
    for (int32_t c = 0; c < classes; ++c) ends[c * kSlots] = {A(0), A(0)};
#pragma unroll
    for (int i = 0; i < P; ++i) {
      if (label[i] < 0) continue;
      const A lower = of_lower(i, value[i]), upper = value[i] - lower;
      add_to(label[i], upper, lower);
      add_to(runner_up[i], -upper, -lower);
    }
  } else {
    A shift[P], upper[P], lower[P];  // value * scale, divided between both rows
    pixels.template load_map<A>(inputs.shift, shift);
    pixels.template load_map<A>(inputs.scale, upper);
#pragma unroll
    for (int i = 0; i < P; ++i) {
      if (label[i] < 0) shift[i] = kInfinity<A>;  // exponential 0
      upper[i] *= value[i];
      lower[i] = of_lower(i, upper[i]);
      upper[i] -= lower[i];
    }
    int32_t lowest = label[0], highest = label[0];
#pragma unroll
    for (int i = 1; i < P; ++i) {
      lowest = label[i] < lowest ? label[i] : lowest;
      highest = label[i] > highest ? label[i] : highest;
    }
    const auto add_up = [&](auto is_finite) {
      bool all_finite = true;
      pixels.for_each_class(first_class, first_class + classes, [&](int32_t c, auto rows) {
        // Far from infinity: behind the quad, where there are no pixels, between() extrapolates.
        all_finite &= std::fabs(rows.upper) + std::fabs(rows.lower) < A(1e30);
        Ends<A> sum{A(0), A(0)};
        A e[P];
#pragma unroll
        for (int i = 0; i < P; ++i) {
          e[i] = exp_or_huge(pixels.between(rows, i) - shift[i]);
          if (!is_finite.value && label[i] < 0) e[i] = 0;  // 0 * NaN would be NaN
        }
        // Pixels above one another mostly have one label, and most classes none of them.
        if (c < lowest || c > highest) {
#pragma unroll
          for (int i = 0; i < P; ++i) {
            sum.upper += upper[i] * e[i];
            sum.lower += lower[i] * e[i];
          }
        } else {
          // The 1 of each pixel's label by itself: subtracted from the sum, rounding would leave noise where softmax is
          // nearly 1.
#pragma unroll
          for (int i = 0; i < P; ++i) {
            const A one = label[i] == c ? value[i] : A(0), one_lower = of_lower(i, one);
            sum.upper += std::fma(upper[i], e[i], one_lower - one);
            sum.lower += std::fma(lower[i], e[i], -one_lower);
          }
        }
        ends[(c - first_class) * kSlots] = sum;
      });
      return all_finite;
    };
    if (!add_up(std::true_type{})) add_up(std::false_type{});
  }
  return counts >> 16 != 0;
}

template <class S, int P, bool kMargin>
__global__ void __launch_bounds__(kThreads, kBlocks<S>)
    resampled_gradient_kernel(Problem problem, GradientInputs inputs, Patches patches, Partial* partial) {
  using Mine = Pixels<S, P, true>;
  using A = Compute<S>;
  __shared__ Ends<A> of_pixels[kTile<A>][kSlots];
  __shared__ A right_weight[kSlots];           // of a column of pixels, by slot: what it adds to the logits right of it
  __shared__ Ends<A> of_logits[kTile<A>][kQuads];  // sums for the row of logits that is being completed, and the next
  __shared__ int32_t first[kQuads + 1];        // column of pixels at which a quad begins
  const TensorView& grad = problem.grad;
  const int32_t h = static_cast<int32_t>(patches.y.in), w = static_cast<int32_t>(patches.x.in);
  const int32_t n = blockIdx.x / patches.count, block = blockIdx.x % patches.count;
  const int32_t first_class = block % patches.tiles_c * patches.classes;
  const int32_t first_quad = block / patches.tiles_c % patches.tiles_x * patches.columns;
  const int32_t row = block / patches.tiles_c / patches.tiles_x * patches.rows;
  const int32_t last_row = row + patches.rows < h ? row + patches.rows : h;
  const int32_t columns = first_quad + patches.columns < w ? patches.columns : w - first_quad;
  const int32_t all_classes = static_cast<int32_t>(problem.logits.size[1]);
  const int32_t classes = first_class + patches.classes < all_classes ? patches.classes : all_classes - first_class;
  const int32_t origin = static_cast<int32_t>(patches.x.first_output(first_quad));
  const int32_t thread = static_cast<int32_t>(threadIdx.x);

  // Calls f(c, j) for the logits of this thread, always the same ones: class and column of the block.
  const auto for_each_logit = [&](auto&& f) {
    const int32_t step_c = kThreads / columns, step_j = kThreads % columns;
    int32_t c = thread / columns, j = thread % columns;
    while (c < classes) {
      f(c, j);
      c += step_c, j += step_j;
      if (j >= columns) j -= columns, ++c;
    }
  };

  // Column j receives from the quads j and j + 1.
  for (int32_t j = thread; j < columns + 2; j += kThreads)
    first[j] = static_cast<int32_t>(patches.x.first_output(first_quad + j) - origin);
  for_each_logit([&](int32_t c, int32_t j) { of_logits[c][j] = {A(0), A(0)}; });
  __syncthreads();
  const int32_t width = first[columns + 1];
  int32_t counts = 0;

  int32_t end_y = static_cast<int32_t>(patches.y.first_output(row));
  for (int32_t quad_y = row; quad_y <= last_row; ++quad_y) {
    const int32_t begin_y = end_y;
    end_y += patches.y.outputs_from(begin_y, patches.y.rest(begin_y, quad_y));
    for (int32_t y = begin_y; y < end_y; y += P) {
      for (int32_t strip = 0; strip < width; strip += kThreads) {
        if (strip + thread < width) {
          const int32_t x = origin + strip + thread, quad_x = static_cast<int32_t>(patches.x.quad_of(x));
          const Mine pixels(problem, patches.y, patches.x, n, y, x, quad_y, quad_x,
                            end_y - y < P ? end_y - y : P);
          const int32_t slot = thread + quad_x - first_quad;
          right_weight[slot] = transposed(pixels.wx1, quad_x, w);
          counts |= column_gradient<kMargin>(problem, inputs, pixels, quad_y, h, first_class, classes,
                                             &of_pixels[0][slot]);
        }
        __syncthreads();
        for_each_logit([&](int32_t c, int32_t j) {
          Ends<A> sum = of_logits[c][j];
#pragma unroll
          for (int32_t side = 0; side < 2; ++side) {  // the quad left of the logit, and the one right of it
            const int32_t quad = j + side;
            int32_t x = first[quad] - strip, end = first[quad + 1] - strip;
            if (x < 0) x = 0;
            if (end > kThreads) end = kThreads;
            for (; x < end; ++x) {
              const int32_t slot = x + quad;
              const A weight = side == 0 ? right_weight[slot] : A(1) - right_weight[slot];
              const Ends<A> of_column = of_pixels[c][slot];
              sum.upper += weight * of_column.upper;
              sum.lower += weight * of_column.lower;
            }
          }
          of_logits[c][j] = sum;
        });
        __syncthreads();
      }
    }
    for_each_logit([&](int32_t c, int32_t j) {
      const Ends<A> sum = of_logits[c][j];
      if (quad_y > row) {
        const int64_t to = scaled(n, grad.stride[0]) + scaled(first_class + c, grad.stride[1]) +
                           scaled(quad_y - 1, grad.stride[2]) + scaled(first_quad + j, grad.stride[3]);
        *at<S>(grad, to) = from_compute<S>(sum.upper);
      }
      of_logits[c][j] = {sum.lower, A(0)};
    });
  }
  counts = block_sum(counts);
  if (partial != nullptr) store_partial(partial, 0, 0, counts > 0 ? 1 << 16 : 0);
}

// Few blocks leave a GPU idle, few rows are computed half in vain.
constexpr int64_t kBlocksWanted = 1024;
constexpr int32_t kMostRows = 8, kFewestRows = 2;

template <class A>
Patches patches_of(int64_t n, int64_t classes, const Axis& y, const Axis& x) {
  Patches patches{};
  patches.y = y, patches.x = x;
  // As equal as they can be.
  patches.tiles_c = static_cast<int32_t>(ceil_div(classes, kTile<A>));
  patches.classes = static_cast<int32_t>(ceil_div(classes, patches.tiles_c));
  const int64_t most = x.most_outputs() > 1 ? x.most_outputs() : 1;
  const int64_t quads = kThreads / most < kQuads ? kThreads / most : kQuads;
  patches.tiles_x = static_cast<int32_t>(ceil_div(x.in, quads > 2 ? quads - 1 : 1));
  patches.columns = static_cast<int32_t>(ceil_div(x.in, patches.tiles_x));
  const int64_t across = int64_t{patches.tiles_c} * patches.tiles_x;
  patches.rows = kMostRows;
  while (patches.rows > kFewestRows && n * across * ceil_div(y.in, patches.rows) < kBlocksWanted) patches.rows /= 2;
  patches.count = static_cast<int32_t>(across * ceil_div(y.in, patches.rows));
  return patches;
}

template <class S>
Error launch_resampled(const Problem& problem, const GradientInputs& inputs, Partial* partial, int32_t* blocks,
                       int64_t stream) {
  const TensorView &logits = problem.logits, &labels = problem.labels;
  const Axis y = make_axis(logits.size[2], labels.size[1], problem.align_corners);
  const Axis x = make_axis(logits.size[3], labels.size[2], problem.align_corners);
  const Patches patches = patches_of<Compute<S>>(logits.size[0], logits.size[1], y, x);
  *blocks = patches.count;
  constexpr int kHigh = kColumn, kLow = kColumn / 2;
  auto kernel = inputs.margin ? resampled_gradient_kernel<S, kHigh, true> : resampled_gradient_kernel<S, kHigh, false>;
  if (patches.y.most_outputs() <= kLow)
    kernel = inputs.margin ? resampled_gradient_kernel<S, kLow, true> : resampled_gradient_kernel<S, kLow, false>;
  return launch("resampled_gradient", kernel, logits.size[0] * *blocks, stream, problem, inputs, patches, partial);
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
  const bool aligned = maps_are_aligned(inputs.runner_up, inputs.shift, inputs.scale, inputs.pixel_weight);
  return dispatch_pixels(problem, inputs.grad_loss, aligned, [&](auto tag, const Walk& walk) -> Error {
    using Mine = typename decltype(tag)::type;
    using S = typename Mine::Storage;
    int32_t blocks = static_cast<int32_t>(walk.blocks.value);
    Error error{};
    if constexpr (Mine::kResamples) {
      error = launch_resampled<S>(problem, inputs, partial, &blocks, stream);
    } else {
      const auto kernel = inputs.margin ? gradient_kernel<Mine, true> : gradient_kernel<Mine, false>;
      error = launch("gradient", kernel, n * blocks, stream, problem, inputs, walk, partial);
    }
    return error ? error : finish<S>(results, n, partial, blocks, stream);
  });
}

int64_t pixel_workspace(int64_t N, int64_t C, int64_t h, int64_t w, int64_t H, int64_t W, bool align_corners) {
  if (h == H && w == W) return N * ceil_div(H * W, kThreads) * sizeof(Partial);
  const Axis y = make_axis(h, H, align_corners), x = make_axis(w, W, align_corners);
  const int64_t rows = (h + 1) * ceil_div(y.most_outputs(), kColumn);
  const int64_t forward = ceil_div(W * (rows > H ? rows : H), kThreads);
  const int64_t of_float = patches_of<float>(N, C, y, x).count, of_double = patches_of<double>(N, C, y, x).count;
  const int64_t backward = of_float > of_double ? of_float : of_double;
  return N * (forward > backward ? forward : backward) * sizeof(Partial);
}

}  // namespace segadv::cuda
