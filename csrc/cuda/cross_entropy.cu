// Cross-entropy, SegPGD's and CosPGD's weighted forms of it, and their gradients.
//
// Fuses upsampling, log-softmax, label lookup, masking, the pixel weights, the sums per image and, at full resolution,
// the gradient. One pass over the classes, with one exponential for each. At full resolution it finds the largest logit
// on its way (online softmax). Resampled, it takes the exponential of the difference to the label's own logit, which
// four loads give beforehand: their sum is 1 / softmax of the label. Only where that is too large, for a loss above 27
// or for what is not finite, the largest logit is looked for, and the pass repeated. Fewest bytes: the logits read
// once, the gradient written once, labels read once. For its exponentials the gradient reads the logits a second time,
// from the cache as far as the blocks at work fit; in channels_last up to 128 bytes of a pixel are in shared memory
// still. At full resolution bound by memory. Resampled, by arithmetic.
//
// Expected, from the compiler's report (nvcc 13.0, sm_90, float32) and arithmetic, not measured: at full resolution 48
// registers, 62 % occupancy; 19 classes and int64 labels take 84 bytes per pixel, 160 with the gradient. Resampled,
// eightfold: 71 instructions for a class of 8 pixels (CosPGD 79; SegPGD looks for the largest logit: another 23 to 71),
// while the unit that computes its 8 exponentials needs 64 cycles for a warp; where a column begins and ends, some
// 1,000, as many as 14 classes take; 80 to 90 registers, 31 to 38 %. Fraction of the limit reached: not yet measured.
#include "cuda/gradient.cuh"
#include "cuda/pixels.cuh"

namespace segadv::cuda {
namespace {

// Sums of exponentials must stay below it: an outgoing gradient divided by one should not be too small for a float.
template <class A>
constexpr A kTooLarge = A(1e12);

template <class Mine, Loss kLoss>
__global__ void __launch_bounds__(kThreads, Mine::kResamples ? kBlocks<typename Mine::Storage> : 0)
    cross_entropy_kernel(CrossEntropyParams params, Walk walk, Partial* partial) {
  using A = typename Mine::A;
  constexpr int P = Mine::kPixels;
  constexpr bool kUp = Mine::kResamples;
  const Problem& problem = params.problem;
  const Mine pixels(problem, walk);
  int32_t label[P], prediction[P];
  const int32_t counts = pixels.labels(problem, label);
  const int32_t classes = static_cast<int32_t>(problem.logits.size[1]);
  A own[P], shift[P], total[P], squares[P];
  if constexpr (kUp) {
    bool fits = true;
    const auto sum_up = [&](const A (&to)[P]) {
#pragma unroll
      for (int i = 0; i < P; ++i) {
        shift[i] = to[i];
        total[i] = squares[i] = A(0);
      }
      pixels.template for_each_class<int32_t, Mine::kUnroll>(0, classes, [&](int32_t, auto rows) {
#pragma unroll
        for (int i = 0; i < P; ++i) {
          const A e = exp_or_huge(pixels.between(rows, i) - shift[i]);
          total[i] += e;
          if constexpr (kLoss == Loss::kCosPGD) squares[i] = std::fma(e, e, squares[i]);
        }
      });
#pragma unroll
      for (int i = 0; i < P; ++i) fits &= label[i] < 0 || total[i] < kTooLarge<A>;
    };
    pixels.load_own(label, own);
    sum_up(own);
    if (kLoss == Loss::kSegPGD || !__all_sync(kAllLanes, fits)) {
      A largest[P], unused[P];
      find_largest<false>(pixels, classes, label, unused, largest, prediction);
      if (!fits) sum_up(largest);
    }
  } else {
    // Not -infinity: the difference to a class of logit -infinity must not be NaN.
#pragma unroll
    for (int i = 0; i < P; ++i) {
      shift[i] = kLowest<A>;
      total[i] = squares[i] = own[i] = A(0);
      prediction[i] = 0;
    }
    pixels.for_each_logit(classes, [&](int32_t c, const A (&z)[P]) {
#pragma unroll
      for (int i = 0; i < P; ++i) {
        own[i] = label[i] == c ? z[i] : own[i];
        const A difference = z[i] - shift[i];
        const bool higher = difference > A(0);  // of two equal ones the first stays; a NaN reaches the total below
        const A e = exp_nonpositive(-std::fabs(difference));
        total[i] = higher ? total[i] * e + A(1) : total[i] + e;
        if constexpr (kLoss == Loss::kCosPGD) squares[i] = higher ? squares[i] * (e * e) + A(1) : squares[i] + e * e;
        if constexpr (kLoss == Loss::kSegPGD) prediction[i] = higher ? c : prediction[i];
        shift[i] = higher ? z[i] : shift[i];
      }
    });
    // Of a logit of infinity nobody knows the exponential, nor of logits that all are -infinity: NaN, as in PyTorch.
#pragma unroll
    for (int i = 0; i < P; ++i) {
      const bool is_known = total[i] > A(0) && shift[i] < kInfinity<A>;
      total[i] = is_known ? total[i] : kNaN<A>;
    }
  }
  const SegPGDWeights<A> of(params.lambda, params.targeted);
  A loss[P], weight[P], scale[P];
  A loss_sum = 0, weight_sum = 0;
#pragma unroll
  for (int i = 0; i < P; ++i) weight[i] = A(1);
  if (params.class_weight.data != nullptr) multiply_by_class_weight(params.class_weight, pixels, label, weight);
#pragma unroll
  for (int i = 0; i < P; ++i) {
    const bool valid = label[i] >= 0;
    const A above_shift = own[i] - shift[i];
    if constexpr (kLoss == Loss::kSegPGD) {
      weight[i] *= prediction[i] == label[i] ? of.correct : of.wrong;
    } else if constexpr (kLoss == Loss::kCosPGD) {
      weight[i] *= cospgd_weight(above_shift, squares[i], params.targeted);
    }
    weight[i] = valid ? weight[i] : A(0);
    loss[i] = valid ? (log_of_sum(total[i]) - above_shift) * weight[i] : A(0);
    shift[i] = valid ? shift[i] : A(0);
    scale[i] = valid ? reciprocal(total[i]) : A(0);
    loss_sum += loss[i];
    weight_sum += weight[i];
  }
  if (params.pixel_loss.data != nullptr) pixels.template store_map<A>(params.pixel_loss, loss);
  if (params.shift.data != nullptr) pixels.template store_map<A>(params.shift, shift);
  if (params.scale.data != nullptr) pixels.template store_map<A>(params.scale, scale);
  if (params.pixel_weight.data != nullptr) pixels.template store_map<A>(params.pixel_weight, weight);
  if constexpr (!kUp) {
    if (problem.grad.data != nullptr) {
#pragma unroll
      for (int i = 0; i < P; ++i) scale[i] *= weight[i];
      pixels.template store_gradient<true>(problem.grad, classes, [&](int32_t c, const A (&z)[P], A (&g)[P]) {
#pragma unroll
        for (int i = 0; i < P; ++i) g[i] = cross_entropy_gradient(c, label[i], z[i], shift[i], scale[i], weight[i]);
      });
    }
  }
  store_partial(partial, block_sum(loss_sum), block_sum(weight_sum), block_sum(counts));
}

}  // namespace

Error cross_entropy(const CrossEntropyParams& params, void* workspace, int64_t stream) {
  const Problem& problem = params.problem;
  const int64_t n = problem.logits.size[0];
  Partial* partial = static_cast<Partial*>(workspace);
  const bool aligned =
      maps_are_aligned(params.pixel_loss, params.shift, params.scale, params.pixel_weight);
  return dispatch_pixels(problem, {}, aligned, [&](auto tag, const Walk& walk) {
    using Mine = typename decltype(tag)::type;
    auto kernel = cross_entropy_kernel<Mine, Loss::kCrossEntropy>;
    if (params.loss == Loss::kSegPGD) kernel = cross_entropy_kernel<Mine, Loss::kSegPGD>;
    if (params.loss == Loss::kCosPGD) kernel = cross_entropy_kernel<Mine, Loss::kCosPGD>;
    const int64_t blocks = n * walk.blocks.value;
    if (const Error error = launch("cross_entropy", kernel, blocks, stream, params, walk, partial)) return error;
    if (problem.grad && Mine::kResamples) {
      GradientInputs inputs;
      inputs.shift = params.shift, inputs.scale = params.scale;
      inputs.pixel_weight = params.pixel_weight;  // in which the class's weight is already
      if (!params.pixel_weight) inputs.class_weight = params.class_weight;
      if (const Error error = resampled_gradient(problem, inputs, stream)) return error;
    }
    const Results results{params.loss_sum, params.weight_sum, params.n_valid, params.pixel_loss, problem.grad};
    return finish<typename Mine::Storage>(results, n, partial, walk.blocks.value, stream);
  });
}

Error cross_entropy_backward(const CrossEntropyBackwardParams& params, void* workspace, int64_t stream) {
  GradientInputs inputs;
  inputs.shift = params.shift, inputs.scale = params.scale;
  inputs.grad_loss = params.grad_loss;
  inputs.class_weight = params.class_weight;
  inputs.pixel_weight = params.pixel_weight;
  return gradient(params.problem, inputs, workspace, stream);
}

}  // namespace segadv::cuda
