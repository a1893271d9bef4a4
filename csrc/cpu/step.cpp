// The steps of the attacks in pixel space, and the scaling of a gradient. Each image is a row of `numel` elements in
// whatever dense order.
//
// newton_step fuses the L1 norm, eps = gain / norm, the sign, the step and the clip: the gradient is read twice (the
// second time from the cache, where it fits), the images once, the result written once. sign_step fuses step,
// projection and clip: every input read once. Both are bound by memory: 1.2 times an addition of two images into fresh
// memory (benchmarks/ops.py, floor). scale_gradient, with which a backward ends, reads and writes once too.
#include <algorithm>
#include <vector>

#include "common/dtype.h"
#include "common/layout.h"
#include "common/step.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace segadv::cpu {
namespace {

constexpr int64_t kItem = 64 << 10;  // elements of an item

template <class A, class S>
SEGADV_INLINE A absolute(S value) {
  const A a = to_compute(value);
  return a < A(0) ? -a : a;
}

// Of eight numbers in the compute type, of those sums in float64.
template <class S>
SEGADV_INLINE double absolute_sum(const S* grad, int64_t count) {
  using A = Compute<S>;
  constexpr int64_t kSums = 32, kBlock = 8 * kSums;
  const int64_t end = count / kBlock * kBlock;
  double total = 0;
  for (int64_t i = 0; i < end; i += kBlock) {
#pragma omp simd reduction(+ : total)
    for (int64_t p = i; p < i + kSums; ++p) {
      A sum = 0;
#pragma GCC unroll 8
      for (int64_t r = 0; r < kBlock; r += kSums) sum += absolute<A>(grad[p + r]);
      total += sum;
    }
  }
  for (int64_t i = end; i < count; ++i) total += absolute<A>(grad[i]);
  return total;
}

template <class A>
SEGADV_INLINE void step(const A* images, const A* grad, A* out, int64_t count, A alpha, A low, A high) {
  SEGADV_SIMD
  for (int64_t i = 0; i < count; ++i) out[i] = clip(images[i] + alpha * sign(grad[i]), low, high);
}

template <class A>
SEGADV_INLINE void projected_step(const A* images, const A* grad, const A* origin, A* out, int64_t count, A alpha,
                                  A eps, A low, A high) {
  SEGADV_SIMD
  for (int64_t i = 0; i < count; ++i) {
    const A x = project(images[i] + alpha * sign(grad[i]), origin[i], eps);
    out[i] = clip(x, low, high);
  }
}

template <class S>
SEGADV_INLINE void scale_row(const S* grad, S* scaled, int64_t count, Compute<S> factor) {
  SEGADV_SIMD
  for (int64_t i = 0; i < count; ++i) scaled[i] = from_compute<S>(scale(to_compute(grad[i]), factor));
}

// Calls f(image, item, first element, count), which is a SEGADV_BODY, in parallel; items and elements are numbered over
// all images.
template <class F>
void for_each_item(int64_t n, int64_t numel, F&& f) {
  const int64_t per_image = ceil_div(numel, kItem);
  parallel_for(n * per_image, [&](int64_t i) {
    const int64_t begin = i % per_image * kItem;
    const int64_t count = std::min(kItem, numel - begin);
    on_this_cpu([&]() SEGADV_BODY { f(i / per_image, i, i / per_image * numel + begin, count); });
  });
}

template <class S>
std::vector<double> norms(const S* grad, int64_t n, int64_t numel) {
  const int64_t per_image = ceil_div(numel, kItem);
  std::vector<double> partial(n * per_image), norm(n, 0.0);
  for_each_item(n, numel, [&](int64_t, int64_t item, int64_t i, int64_t count) SEGADV_BODY {
    partial[item] = absolute_sum(grad + i, count);
  });
  for (int64_t image = 0; image < n; ++image)
    for (int64_t i = 0; i < per_image; ++i) norm[image] += partial[image * per_image + i];
  return norm;
}

template <class A>
const A* data(const TensorView& view) {
  return static_cast<const A*>(view.data);
}

}  // namespace

int64_t l1_norm(const L1NormParams& params) {
  dispatch_floating(params.grad.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const std::vector<double> norm = norms(data<S>(params.grad), params.n, params.numel);
    for (int64_t image = 0; image < params.n; ++image)
      static_cast<Compute<S>*>(params.norm.data)[image] = static_cast<Compute<S>>(norm[image]);
  });
  return -1;
}

int64_t newton_step(const NewtonStepParams& params) {
  dispatch_images(params.images.dtype, [&](auto tag) {
    using A = typename decltype(tag)::type;
    A *eps = static_cast<A*>(params.eps.data), *norm = static_cast<A*>(params.norm.data);
    A* out = static_cast<A*>(params.adversarial.data);
    const std::vector<double> exact = norms(data<A>(params.grad), params.n, params.numel);
    for (int64_t image = 0; image < params.n; ++image) {
      norm[image] = static_cast<A>(exact[image]);
      eps[image] = newton_eps(data<A>(params.gain)[image], norm[image], params.clamp_negative, params.max_eps);
    }
    advise_huge_pages(out, params.n * params.numel * sizeof(A));
    for_each_item(params.n, params.numel, [&](int64_t image, int64_t, int64_t i, int64_t count) SEGADV_BODY {
      step(data<A>(params.images) + i, data<A>(params.grad) + i, out + i, count, -eps[image],
           static_cast<A>(params.low), static_cast<A>(params.high));
    });
  });
  return -1;
}

int64_t sign_step(const SignStepParams& params) {
  dispatch_images(params.images.dtype, [&](auto tag) {
    using A = typename decltype(tag)::type;
    A* out = static_cast<A*>(params.adversarial.data);
    advise_huge_pages(out, params.n * params.numel * sizeof(A));
    for_each_item(params.n, params.numel, [&](int64_t image, int64_t, int64_t i, int64_t count) SEGADV_BODY {
      const A alpha = params.alpha_per_image ? data<A>(params.alpha_per_image)[image] : static_cast<A>(params.alpha);
      const A low = static_cast<A>(params.low), high = static_cast<A>(params.high);
      if (params.origin) {
        const A eps = params.eps_per_image ? data<A>(params.eps_per_image)[image] : static_cast<A>(params.eps);
        projected_step(data<A>(params.images) + i, data<A>(params.grad) + i, data<A>(params.origin) + i, out + i,
                       count, alpha, eps, low, high);
      } else {
        step(data<A>(params.images) + i, data<A>(params.grad) + i, out + i, count, alpha, low, high);
      }
    });
  });
  return -1;
}

int64_t scale_gradient(const ScaleGradientParams& params) {
  dispatch_floating(params.grad.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    S* scaled = static_cast<S*>(params.scaled.data);
    advise_huge_pages(scaled, params.n * params.numel * sizeof(S));
    for_each_item(params.n, params.numel, [&](int64_t image, int64_t, int64_t i, int64_t count) SEGADV_BODY {
      const Compute<S> factor = data<Compute<S>>(params.factor)[image * params.factor.stride[0]];
      scale_row(data<S>(params.grad) + i, scaled + i, count, factor);
    });
  });
  return -1;
}

}  // namespace segadv::cpu
