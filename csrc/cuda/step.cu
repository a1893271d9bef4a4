// The steps of the attacks in pixel space, and the scaling of a gradient. Each image is a row of `numel` elements in
// whatever dense order.
//
// newton_step, two kernels: the absolute sums of chunks; then the norm (each block adds up its image's chunks), eps =
// gain / norm, sign, step and clip. Fewest bytes: gradient and images read once, the result written once. The second
// reading of the gradient goes backwards, so that it starts with what the cache still holds, and images and result do
// not push that out. sign_step fuses step, projection and clip: every input read once. Both are bound by memory.
//
// scale_gradient, with which a backward ends, reads and writes a gradient once; the result is left in the cache, since
// the network's backward reads it next.
//
// Expected, from the compiler's report (nvcc 13.0, sm_90, float32) and arithmetic, not measured: 32 to 40 registers, 75
// to 100 % occupancy; 12 bytes per element where the cache holds the gradient, else 16; sign_step 12, or 16 with an
// origin; scale_gradient 8. Fraction of the limit reached: not yet measured.
#include <cmath>

#include "common/dtype.h"
#include "common/step.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace segadv::cuda {
namespace {

constexpr int64_t kChunk = 32 * kThreads;  // elements of a block, or a multiple of it ...
constexpr int64_t kMostChunks = 512;       // ... so that an image has no more of them than this

struct Chunks {
  int64_t numel, chunk;
  int32_t count;  // of an image
};

Chunks chunks_of(int64_t numel) {
  const int64_t chunk = ceil_div(ceil_div(numel, kMostChunks), kChunk) * kChunk;
  return {numel, chunk, numel == 0 ? 0 : static_cast<int32_t>(ceil_div(numel, chunk))};
}

// Calls f(first element, V) for a thread's share of a chunk, with V elements at once.
template <int V, class F>
__device__ __forceinline__ void for_each_pack(const Chunks& chunks, int32_t k, F&& f) {
  const int64_t begin = k * chunks.chunk, behind = begin + chunks.chunk;
  const int64_t end = behind < chunks.numel ? behind : chunks.numel;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x * V; i < end; i += kThreads * V) f(i);
}

template <class S, int V>
__global__ void __launch_bounds__(kThreads) absolute_sum_kernel(const S* grad, Chunks chunks, Compute<S>* partial) {
  using A = Compute<S>;
  const int64_t n = blockIdx.x / chunks.count;
  A sums[V] = {};  // several: of few numbers each, and none waits for the addition before
  for_each_pack<V>(chunks, blockIdx.x % chunks.count, [&](int64_t i) {
    const Pack<S, V> g = load_pack<V>(grad + n * chunks.numel + i);
#pragma unroll
    for (int j = 0; j < V; ++j) sums[j] += std::fabs(to_compute(g.values[j]));
  });
  A sum = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) sum += sums[j];
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <class A>
__global__ void __launch_bounds__(kThreads) norm_kernel(const A* partial, int32_t count, A* norm) {
  const double total = sum_of_partials<double>(partial + int64_t{blockIdx.x} * count, count);
  if (threadIdx.x == 0) norm[blockIdx.x] = static_cast<A>(total);
}

template <class A, int V>
__global__ void __launch_bounds__(kThreads)
    newton_step_kernel(NewtonStepParams params, Chunks chunks, const A* partial) {
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t n = block / chunks.count;
  const int32_t k = block % chunks.count;
  const A gain = static_cast<const A*>(params.gain.data)[n];  // before the barriers of the sum: waited for with it
  const A norm = static_cast<A>(sum_of_partials<double>(partial + n * chunks.count, chunks.count));
  const A eps = newton_eps(gain, norm, params.clamp_negative, params.max_eps);
  if (k == 0 && threadIdx.x == 0) {
    static_cast<A*>(params.eps.data)[n] = eps;
    static_cast<A*>(params.norm.data)[n] = norm;
  }
  const A low = static_cast<A>(params.low), high = static_cast<A>(params.high);
  const A* __restrict__ images = static_cast<const A*>(params.images.data) + n * chunks.numel;
  const A* __restrict__ grad = static_cast<const A*>(params.grad.data) + n * chunks.numel;
  A* __restrict__ adversarial = static_cast<A*>(params.adversarial.data) + n * chunks.numel;
  for_each_pack<V>(chunks, k, [&](int64_t i) {
    Pack<A, V> x = load_pack_once<V>(images + i);
    const Pack<A, V> g = load_pack<V>(grad + i);
#pragma unroll
    for (int j = 0; j < V; ++j) x.values[j] = clip(x.values[j] - eps * sign(g.values[j]), low, high);
    store_pack_once(adversarial + i, x);
  });
}

template <class A>
__device__ __forceinline__ A per_image(const TensorView& values, double value, int64_t n) {
  return values.data != nullptr ? static_cast<const A*>(values.data)[n] : static_cast<A>(value);
}

template <class A, int V, bool kBall>
__global__ void __launch_bounds__(kThreads) sign_step_kernel(SignStepParams params, Chunks chunks) {
  const int64_t n = blockIdx.x / chunks.count;
  const A alpha = per_image<A>(params.alpha_per_image, params.alpha, n);
  const A eps = per_image<A>(params.eps_per_image, params.eps, n);
  const A low = static_cast<A>(params.low), high = static_cast<A>(params.high);
  const A* __restrict__ images = static_cast<const A*>(params.images.data) + n * chunks.numel;
  const A* __restrict__ grad = static_cast<const A*>(params.grad.data) + n * chunks.numel;
  const A* __restrict__ origin = static_cast<const A*>(params.origin.data) + (kBall ? n * chunks.numel : 0);
  A* __restrict__ adversarial = static_cast<A*>(params.adversarial.data) + n * chunks.numel;
  for_each_pack<V>(chunks, blockIdx.x % chunks.count, [&](int64_t i) {
    Pack<A, V> x = load_pack<V>(images + i);
    const Pack<A, V> g = load_pack<V>(grad + i);
    Pack<A, V> center;
    if constexpr (kBall) center = load_pack<V>(origin + i);
#pragma unroll
    for (int j = 0; j < V; ++j) x.values[j] += alpha * sign(g.values[j]);
    if constexpr (kBall) {
#pragma unroll
      for (int j = 0; j < V; ++j) x.values[j] = project(x.values[j], center.values[j], eps);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) x.values[j] = clip(x.values[j], low, high);
    store_pack(adversarial + i, x);
  });
}

template <class S, int V>
__global__ void __launch_bounds__(kThreads)
    scale_gradient_kernel(const S* __restrict__ grad, Chunks chunks, const Compute<S>* factor, int64_t stride,
                          S* __restrict__ scaled) {
  const int64_t n = blockIdx.x / chunks.count;
  const Compute<S> by = factor[n * stride];
  for_each_pack<V>(chunks, blockIdx.x % chunks.count, [&](int64_t i) {
    // A plain load of what is not written: the compiler moves four of them before the first store.
    Pack<S, V> g = load_pack<V>(grad + n * chunks.numel + i);
#pragma unroll
    for (int j = 0; j < V; ++j) g.values[j] = from_compute<S>(scale(to_compute(g.values[j]), by));
    store_pack(scaled + n * chunks.numel + i, g);
  });
}

// Whether every image of every tensor begins at a multiple of 16 bytes.
template <class S, class... Views>
bool takes_vectors(int64_t numel, const Views&... views) {
  return numel % kVector<S> == 0 && (is_aligned(views) && ...);
}

template <class T>
T* data(const TensorView& view) {
  return static_cast<T*>(view.data);
}

template <class S>
Error absolute_sums(const TensorView& grad, int64_t n, const Chunks& chunks, void* partial, int64_t stream) {
  const bool vectors = takes_vectors<S>(chunks.numel, grad);
  const auto kernel = vectors ? absolute_sum_kernel<S, kVector<S>> : absolute_sum_kernel<S, 1>;
  return launch("absolute_sum", kernel, n * chunks.count, stream, data<const S>(grad), chunks,
                static_cast<Compute<S>*>(partial));
}

}  // namespace

int64_t image_workspace(int64_t n, int64_t numel) { return n * chunks_of(numel).count * sizeof(double); }

Error l1_norm(const L1NormParams& params, void* workspace, int64_t stream) {
  const Chunks chunks = chunks_of(params.numel);
  return dispatch_floating(params.grad.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using A = Compute<S>;
    if (const Error error = absolute_sums<S>(params.grad, params.n, chunks, workspace, stream)) return error;
    return launch("norm", norm_kernel<A>, params.n, stream, static_cast<const A*>(workspace), chunks.count,
                  data<A>(params.norm));
  });
}

Error newton_step(const NewtonStepParams& params, void* workspace, int64_t stream) {
  const Chunks chunks = chunks_of(params.numel);
  return dispatch_images(params.images.dtype, [&](auto tag) {
    using A = typename decltype(tag)::type;
    if (const Error error = absolute_sums<A>(params.grad, params.n, chunks, workspace, stream)) return error;
    const bool vectors = takes_vectors<A>(params.numel, params.images, params.grad, params.adversarial);
    const auto kernel = vectors ? newton_step_kernel<A, kVector<A>> : newton_step_kernel<A, 1>;
    return launch("newton_step", kernel, params.n * chunks.count, stream, params, chunks,
                  static_cast<const A*>(workspace));
  });
}

Error sign_step(const SignStepParams& params, void*, int64_t stream) {
  const Chunks chunks = chunks_of(params.numel);
  return dispatch_images(params.images.dtype, [&](auto tag) {
    using A = typename decltype(tag)::type;
    const bool vectors = takes_vectors<A>(params.numel, params.images, params.grad, params.adversarial, params.origin);
    auto kernel = vectors ? sign_step_kernel<A, kVector<A>, false> : sign_step_kernel<A, 1, false>;
    if (params.origin) kernel = vectors ? sign_step_kernel<A, kVector<A>, true> : sign_step_kernel<A, 1, true>;
    return launch("sign_step", kernel, params.n * chunks.count, stream, params, chunks);
  });
}

Error scale_gradient(const ScaleGradientParams& params, void*, int64_t stream) {
  const Chunks chunks = chunks_of(params.numel);
  return dispatch_floating(params.grad.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const bool vectors = takes_vectors<S>(params.numel, params.grad, params.scaled);
    const auto kernel = vectors ? scale_gradient_kernel<S, kVector<S>> : scale_gradient_kernel<S, 1>;
    return launch("scale_gradient", kernel, params.n * chunks.count, stream, data<const S>(params.grad), chunks,
                  data<const Compute<S>>(params.factor), params.factor.stride[0], data<S>(params.scaled));
  });
}

Error check() {
#if defined(SEGADV_EMULATED)
  return {};
#else
  int devices = 0;
  const cudaError_t code = cudaGetDeviceCount(&devices);
  return code == cudaSuccess ? Error{} : Error{code, "cudaGetDeviceCount", cudaGetErrorString(code)};
#endif
}

}  // namespace segadv::cuda
