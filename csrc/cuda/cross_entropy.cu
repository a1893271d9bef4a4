// Cross-entropy, SegPGD's and CosPGD's weighted forms of it, and their gradients.
//
// Fuses upsampling, log-softmax, label lookup, masking, the pixel weights, the sums per image and, at full resolution,
// the gradient. Largest logit and sum of exponentials are found in one pass over the classes (online softmax, with one
// exponential per class). Fewest bytes: the logits read once, the gradient written once (its exponentials need a second
// reading of the logits, from the cache as far as the blocks at work fit), labels read once. At full resolution bound
// by memory. Resampled, by arithmetic.
//
// Expected, from the compiler's report (nvcc 13.0, sm_90, float32) and arithmetic, not measured: at full resolution 50
// to 53 registers, 56 % occupancy; 19 classes and int64 labels take 84 bytes per pixel, 160 with the gradient.
// Resampled, eightfold: 103 instructions for a class of 8 pixels (SegPGD 115, CosPGD 135), 112 to 133 registers, 18 to
// 25 %. Fraction of the limit reached: not yet measured.
#include "cuda/gradient.cuh"
#include "cuda/pixels.cuh"

namespace segadv::cuda {
namespace {

// SegPGD's predictions take 8 registers more.
template <class S, int P, bool kUp, Loss kLoss>
__global__ void __launch_bounds__(kThreads, kUp ? kBlocks<S> - (kLoss == Loss::kSegPGD ? 1 : 0) : 0)
    cross_entropy_kernel(CrossEntropyParams params, Walk walk, Partial* partial) {
  using Mine = Pixels<S, P, kUp>;
  using A = Compute<S>;
  const Problem& problem = params.problem;
  const Mine pixels(problem, walk);
  int32_t label[P], prediction[P];
  const int32_t counts = pixels.labels(problem, label);
  // Not -infinity: the difference to a class of logit -infinity must not be NaN.
  A largest[P], total[P], squares[P], own[P];
#pragma unroll
  for (int i = 0; i < P; ++i) {
    largest[i] = kLowest<A>;
    total[i] = squares[i] = own[i] = A(0);
    prediction[i] = 0;
  }
  const auto add = [&](int32_t c, int i, A z) {
    const A difference = z - largest[i];
    const bool higher = difference > A(0);  // of two equal ones the first stays; a NaN reaches the total below
    const A e = exp_nonpositive(-std::fabs(difference));
    total[i] = higher ? total[i] * e + A(1) : total[i] + e;
    if constexpr (kLoss == Loss::kCosPGD) squares[i] = higher ? squares[i] * (e * e) + A(1) : squares[i] + e * e;
    if constexpr (kLoss == Loss::kSegPGD) prediction[i] = higher ? c : prediction[i];
    largest[i] = higher ? z : largest[i];
  };
  const int32_t classes = static_cast<int32_t>(problem.logits.size[1]);
  if constexpr (Mine::kIsColumn) {
    pixels.for_each_class(0, classes, [&](int32_t c, auto rows) {
#pragma unroll
      for (int i = 0; i < P; ++i) add(c, i, pixels.between(rows, i));
    });
    pixels.load_own(label, own);
  } else {
#pragma unroll Mine::kUnroll
    for (int32_t c = 0; c < classes; ++c) {
      A z[P];
      pixels.load(c, z);
#pragma unroll
      for (int i = 0; i < P; ++i) {
        own[i] = label[i] == c ? z[i] : own[i];
        add(c, i, z[i]);
      }
    }
  }
  const A of_correct = static_cast<A>(params.targeted ? params.lambda : 1.0 - params.lambda);
  const A of_wrong = static_cast<A>(params.targeted ? 1.0 - params.lambda : params.lambda);
  A loss[P], log_normalizer[P], weight[P];
  A loss_sum = 0, weight_sum = 0;
#pragma unroll
  for (int i = 0; i < P; ++i) {
    const bool valid = label[i] >= 0;
    const A below_largest = largest[i] - own[i];
    if constexpr (kLoss == Loss::kSegPGD) {
      weight[i] = prediction[i] == label[i] ? of_correct : of_wrong;
    } else if constexpr (kLoss == Loss::kCosPGD) {
      const A cosine = exp_nonpositive(-below_largest) / sqrt(squares[i]);
      weight[i] = params.targeted ? A(1) - cosine : cosine;
    } else {
      const A* class_weight = static_cast<const A*>(params.class_weight.data);
      weight[i] = class_weight != nullptr ? class_weight[valid ? label[i] : 0] : A(1);
    }
    weight[i] = valid ? weight[i] : A(0);
    log_normalizer[i] = valid ? log_normalizer_of(total[i]) : A(0);
    loss[i] = valid ? (log_normalizer[i] + below_largest) * weight[i] : A(0);
    largest[i] = valid ? largest[i] : A(0);
    loss_sum += loss[i];
    weight_sum += weight[i];
  }
  if (params.pixel_loss.data != nullptr) pixels.template store_map<A>(params.pixel_loss, loss);
  if (params.largest.data != nullptr) pixels.template store_map<A>(params.largest, largest);
  if (params.log_normalizer.data != nullptr) pixels.template store_map<A>(params.log_normalizer, log_normalizer);
  if (params.pixel_weight.data != nullptr) pixels.template store_map<A>(params.pixel_weight, weight);
  if constexpr (!kUp) {
    if (problem.grad.data != nullptr) {
#pragma unroll
      for (int i = 0; i < P; ++i) total[i] = weight[i] / total[i];
      // Backwards: where the cache does not hold all logits of the blocks at work, it holds those read last.
#pragma unroll Mine::kUnroll
      for (int32_t c = classes - 1; c >= 0; --c) {
        A z[P], g[P];
        pixels.load(c, z);
#pragma unroll
        for (int i = 0; i < P; ++i) g[i] = cross_entropy_gradient(c, label[i], z[i], largest[i], total[i], weight[i]);
        pixels.store_gradient(problem.grad, c, g);
      }
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
      maps_are_aligned(params.pixel_loss, params.largest, params.log_normalizer, params.pixel_weight);
  return dispatch_pixels(problem, {}, aligned, [&](auto tag, const Walk& walk) {
    using Mine = typename decltype(tag)::type;
    using S = typename Mine::Storage;
    constexpr int P = Mine::kPixels;
    constexpr bool kUp = Mine::kResamples;
    auto kernel = cross_entropy_kernel<S, P, kUp, Loss::kCrossEntropy>;
    if (params.loss == Loss::kSegPGD) kernel = cross_entropy_kernel<S, P, kUp, Loss::kSegPGD>;
    if (params.loss == Loss::kCosPGD) kernel = cross_entropy_kernel<S, P, kUp, Loss::kCosPGD>;
    const int64_t blocks = n * walk.blocks;
    if (const Error error = launch("cross_entropy", kernel, blocks, stream, params, walk, partial)) return error;
    if (problem.grad && kUp) {
      GradientInputs inputs;
      inputs.largest = params.largest, inputs.log_normalizer = params.log_normalizer;
      inputs.class_weight = params.class_weight;
      inputs.pixel_weight = params.pixel_weight;
      if (const Error error = resampled_gradient(problem, inputs, stream)) return error;
    }
    const Results results{params.loss_sum, params.weight_sum, params.n_valid, params.pixel_loss, problem.grad};
    return finish<S>(results, n, partial, walk.blocks, stream);
  });
}

Error cross_entropy_backward(const CrossEntropyBackwardParams& params, void* workspace, int64_t stream) {
  GradientInputs inputs;
  inputs.largest = params.largest, inputs.log_normalizer = params.log_normalizer;
  inputs.grad_loss = params.grad_loss;
  inputs.class_weight = params.class_weight;
  inputs.pixel_weight = params.pixel_weight;
  return gradient(params.problem, inputs, workspace, stream);
}

}  // namespace segadv::cuda
