// The last kernel of every operation on pixels: the sums of an image from those of its blocks, in a fixed order and in
// float64; and NaN all over an image with a bad label: every block looks, and writes only then.
#include "cuda/pixels.cuh"

namespace segadv::cuda {
namespace {

constexpr int kMostParts = 32;  // blocks of an image that write NaN

struct Sums {
  double sum0, sum1;
  int64_t valid, bad;
};

template <class T>
__device__ __forceinline__ void fill_with_nan(const TensorView& view, int64_t n, int64_t numel, int part, int parts) {
  if (view.data == nullptr) return;
  T* to = at<T>(view, n * numel);
  const T nan = from_compute<T>(Compute<T>(0) / Compute<T>(0));
  for (int64_t i = int64_t{part} * kThreads + threadIdx.x; i < numel; i += int64_t{parts} * kThreads) to[i] = nan;
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Results results, const Partial* partial, int32_t blocks, int64_t map_numel, int64_t grad_numel,
                  int32_t parts) {
  using A = Compute<S>;
  const int64_t n = blockIdx.x / parts;
  const int part = blockIdx.x % parts;
  Sums sums{};
  for (int i = threadIdx.x; i < blocks; i += kThreads) {
    const Partial& of_block = partial[n * blocks + i];
    sums.sum0 += of_block.sum0;
    sums.sum1 += of_block.sum1;
    sums.valid += of_block.valid;
    sums.bad += of_block.bad;
  }
  const bool is_bad = block_sum(sums.bad) > 0;
  if (part == 0) {
    const double sum0 = block_sum(sums.sum0), sum1 = block_sum(sums.sum1);
    const int64_t valid = block_sum(sums.valid);
    if (threadIdx.x == 0) {
      const A nan = A(0) / A(0);
      if (results.sum0.data != nullptr) *at<A>(results.sum0, n) = is_bad ? nan : static_cast<A>(sum0);
      if (results.sum1.data != nullptr) *at<A>(results.sum1, n) = is_bad ? nan : static_cast<A>(sum1);
      if (results.n_valid.data != nullptr) *at<int64_t>(results.n_valid, n) = valid;
    }
  }
  if (is_bad) {
    fill_with_nan<A>(results.map, n, map_numel, part, parts);
    fill_with_nan<S>(results.grad, n, grad_numel, part, parts);
  }
}

}  // namespace

template <class S>
Error finish(const Results& results, int64_t n, const Partial* partial, int32_t blocks, int64_t stream) {
  const TensorView &map = results.map, &grad = results.grad;
  const int64_t map_numel = map.data != nullptr ? map.size[1] * map.size[2] : 0;
  const int64_t grad_numel = grad.data != nullptr ? grad.size[1] * grad.size[2] * grad.size[3] : 0;
  const int64_t largest = map_numel > grad_numel ? map_numel : grad_numel;
  const int64_t wanted = ceil_div(largest, 32 * kThreads);
  const int32_t parts = wanted < 1 ? 1 : (wanted > kMostParts ? kMostParts : static_cast<int32_t>(wanted));
  return launch("finish", finish_kernel<S>, n * parts, stream, results, partial, blocks, map_numel, grad_numel, parts);
}

template Error finish<float>(const Results&, int64_t, const Partial*, int32_t, int64_t);
template Error finish<double>(const Results&, int64_t, const Partial*, int32_t, int64_t);
template Error finish<Half>(const Results&, int64_t, const Partial*, int32_t, int64_t);
template Error finish<BFloat16>(const Results&, int64_t, const Partial*, int32_t, int64_t);

}  // namespace segadv::cuda
