// Margin g = z_y - max over the other classes, its sum per image, and the gradient of that sum.
//
// Fuses upsampling, label lookup, masking, the maximum, the mean's sum and, at full resolution, the gradient. Fewest
// bytes: the logits read once, the gradient written once (where wanted), labels read once. At full resolution bound by
// memory. Resampled, by arithmetic.
//
// Expected, from the compiler's report (nvcc 13.0, sm_90, float32; benchmarks.instructions) and arithmetic, not
// measured: at full resolution 44 registers, 62 % occupancy; 19 classes and int64 labels take 84 bytes per pixel, 160
// with the gradient. Resampled, eightfold: 84 instructions for a class of 8 pixels, 36 where `find_largest` leaves them
// out, 72 registers, 43 %. Fraction of the limit reached: not yet measured.
#include "cuda/gradient.cuh"
#include "cuda/pixels.cuh"

namespace segadv::cuda {
namespace {

template <class Mine>
__global__ void __launch_bounds__(kThreads) margin_kernel(MarginParams params, Walk walk, Partial* partial) {
  using A = typename Mine::A;
  constexpr int P = Mine::kPixels;
  const Problem& problem = params.problem;
  const Mine pixels(problem, walk);
  int32_t label[P], runner_up[P];
  const int32_t counts = pixels.labels(problem, label);
  A best[P], own[P];
  const int32_t classes = static_cast<int32_t>(problem.logits.size[1]);
  find_largest<true>(pixels, classes, label, own, best, runner_up);
  A sum = 0;
#pragma unroll
  for (int i = 0; i < P; ++i) {
    own[i] = label[i] >= 0 ? own[i] - best[i] : A(0);  // the margin from here on
    runner_up[i] = label[i] >= 0 ? runner_up[i] : 0;
    sum += own[i];
  }
  if (params.margin.data != nullptr) pixels.template store_map<A>(params.margin, own);
  if (params.runner_up.data != nullptr) pixels.store_classes(params.runner_up, runner_up);
  if constexpr (!Mine::kResamples) {
    if (problem.grad.data != nullptr) {
      pixels.template store_gradient<false>(problem.grad, classes, [&](int32_t c, const A (&)[P], A (&g)[P]) {
#pragma unroll
        for (int i = 0; i < P; ++i) g[i] = margin_gradient(c, label[i], label[i] >= 0 ? runner_up[i] : -1, A(1));
      });
    }
  }
  store_partial(partial, block_sum(sum), 0, block_sum(counts));
}

}  // namespace

Error margin(const MarginParams& params, void* workspace, int64_t stream) {
  const Problem& problem = params.problem;
  const int64_t n = problem.logits.size[0];
  Partial* partial = static_cast<Partial*>(workspace);
  const bool aligned = maps_are_aligned(params.margin, params.runner_up);
  return dispatch_pixels(problem, {}, aligned, [&](auto tag, const Walk& walk) {
    using Mine = typename decltype(tag)::type;
    const auto kernel = margin_kernel<Mine>;
    const int64_t blocks = n * walk.blocks.value;
    if (const Error error = launch("margin", kernel, blocks, stream, params, walk, partial)) return error;
    if (problem.grad && resamples(problem)) {
      if (const Error error = resampled_gradient(problem, {true, params.runner_up}, stream)) return error;
    }
    const Results results{params.gain_sum, {}, params.n_valid, params.margin, problem.grad};
    return finish<typename Mine::Storage>(results, n, partial, walk.blocks.value, stream);
  });
}

Error margin_backward(const MarginBackwardParams& params, void* workspace, int64_t stream) {
  GradientInputs inputs{true, params.runner_up};
  inputs.grad_loss = params.grad_margin;
  return gradient(params.problem, inputs, workspace, stream);
}

}  // namespace segadv::cuda
