// argmax over the classes at the labels' size, and the confusion matrix.
//
// Fuses upsampling, the arg-max, label lookup, masking and the counting. Counts are integers, added by atomics: the
// same bits in any order. Several copies of the matrix, and one addition for a thread's neighbours in the same cell,
// keep the few cells that take most pixels from being the queue for all threads. Fewest bytes: the logits read once,
// labels read once (or predictions written once). Resampled, bound by arithmetic.
//
// Expected, from the compiler's report (nvcc 13.0, sm_90, float32; benchmarks.instructions) and arithmetic, not
// measured: at full resolution 32 registers, 100 % occupancy; 19 classes and int64 labels take 84 bytes per pixel.
// Resampled, eightfold: 76 instructions for a class of 8 pixels, 36 where `find_largest` leaves them out, 72 registers,
// 43 %. Fraction of the limit reached: not yet measured.
#include "cuda/pixels.cuh"

namespace segadv::cuda {
namespace {

template <class Mine>
__global__ void __launch_bounds__(kThreads) confusion_kernel(ConfusionParams params, Walk walk) {
  using A = typename Mine::A;
  constexpr int P = Mine::kPixels;
  const Problem& problem = params.problem;
  const Mine pixels(problem, walk);
  A best[P], unused[P];
  int32_t label[P], best_class[P];
  const int32_t classes = static_cast<int32_t>(problem.logits.size[1]);
  find_largest<false>(pixels, classes, label, unused, best, best_class);
  if (params.prediction.data != nullptr) pixels.store_classes(params.prediction, best_class);
  if (params.counts.data == nullptr) return;
  const int32_t counts = pixels.labels(problem, label);
  const int64_t cells = int64_t{classes} * classes, copies = params.counts.size[1];
  const int64_t copy = (params.per_image ? pixels.n * copies : 0) + blockIdx.x % copies;
  int32_t* matrix = at<int32_t>(params.counts, copy * (cells + 1));
  if (counts >> 16 != 0) atomicAdd(matrix + cells, counts >> 16);
  int64_t cell = -1;
  int32_t run = 0;
#pragma unroll
  for (int i = 0; i < P; ++i) {
    const int64_t next = label[i] >= 0 ? int64_t{label[i]} * classes + best_class[i] : -1;
    if (next != cell) {
      if (cell >= 0) atomicAdd(matrix + cell, run);
      cell = next;
      run = 0;
    }
    ++run;
  }
  if (cell >= 0) atomicAdd(matrix + cell, run);
}

// Adds up the copies: a thread for every cell, and a block, the last one, for the bad labels.
__global__ void __launch_bounds__(kThreads) sum_counts_kernel(ConfusionParams params) {
  const TensorView& counts = params.counts;
  const int64_t images = counts.size[0], copies = counts.size[1], cells = counts.size[2] - 1;
  if (blockIdx.x == gridDim.x - 1) {
    int64_t total = 0;
    for (int64_t k = threadIdx.x; k < images * copies; k += kThreads)
      total += *at<const int32_t>(counts, k * (cells + 1) + cells);
    total = block_sum(total);
    if (threadIdx.x == 0) *at<int64_t>(params.invalid, 0) = total;
    return;
  }
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= images * cells) return;
  const int64_t image = i / cells, cell = i % cells;
  int64_t total = 0;
  for (int64_t k = 0; k < copies; ++k) total += *at<const int32_t>(counts, (image * copies + k) * (cells + 1) + cell);
  *at<int64_t>(params.matrix, i) = total;
}

}  // namespace

Error confusion(const ConfusionParams& params, void*, int64_t stream) {
  const Problem& problem = params.problem;
  const bool aligned = maps_are_aligned(params.prediction);
  const Error error = dispatch_pixels(problem, {}, aligned, [&](auto tag, const Walk& walk) {
    using Mine = typename decltype(tag)::type;
    const auto kernel = confusion_kernel<Mine>;
    return launch("confusion", kernel, problem.logits.size[0] * walk.blocks.value, stream, params, walk);
  });
  if (error || !params.invalid) return error;  // not the counts: those of no image have no address
  const int64_t numbers = params.counts.size[0] * (params.counts.size[2] - 1);
  return launch("sum_counts", sum_counts_kernel, ceil_div(numbers, kThreads) + 1, stream, params);
}

}  // namespace segadv::cuda
