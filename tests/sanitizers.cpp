// Every kernel once, in every walk over the pixels and all floating types, under the sanitizers that built this
// program: those of csrc/cuda or, with SANITIZE_CPU, of csrc/cpu. What they compute is tested elsewhere: here the
// numbers are only looked at for being there.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "segadv.h"

using namespace segadv;

namespace {

// Which tensors begin one element behind a multiple of 16 bytes; kRows: the rows of the logits, each one element more.
enum class Shifted { kNone, kInputs, kMaps, kRows };

// Memory of exactly the right size, so that one element too far is seen.
struct Memory {
  std::vector<std::vector<char>> blocks;
  bool aligned = true;
  TensorView tensor(DType dtype, std::vector<int64_t> sizes) {
    int64_t numel = 1;
    TensorView view;
    view.dtype = dtype;
    for (int d = static_cast<int>(sizes.size()) - 1; d >= 0; --d) {
      view.size[d] = sizes[d];
      view.stride[d] = numel;
      numel *= sizes[d];
    }
    const size_t bytes = dtype == DType::kFloat64 || dtype == DType::kInt64 ? 8
                         : dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4
                         : dtype == DType::kUInt8 ? 1 : 2;
    const size_t before = aligned ? 0 : bytes;
    blocks.emplace_back(before + numel * bytes);
    view.data = blocks.back().data() + before;
    return view;
  }
  void* workspace(int64_t bytes) {
    blocks.emplace_back(bytes);
    return blocks.back().data();
  }
};

template <class S>
void fill(const TensorView& view, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i)
    static_cast<S*>(view.data)[i] = from_compute<S>(static_cast<Compute<S>>((i * 7919 + 13) % 997) / Compute<S>(100));
}

void fail(const std::string& what, const char* kernel, const char* message) {
  std::fprintf(stderr, "%s: %s: %s\n", what.c_str(), kernel, message);
  std::exit(1);
}

// call(kernel, parameters, workspace, position of the first bad label, or -1, what)
#if defined(SANITIZE_CPU)
namespace kernels = segadv::cpu;

template <class Params>
void call(int64_t (*kernel)(const Params&), const std::decay_t<Params>& params, void*, int64_t bad,
          const std::string& what) {
  if (kernel(params) != bad) fail(what, "on the CPU", "another place of the first bad label than expected");
}
void* pixel_workspace(Memory&, const Problem&) { return nullptr; }
void* image_workspace(Memory&, int64_t, int64_t) { return nullptr; }
#else
namespace kernels = segadv::cuda;

template <class Params>
void call(cuda::Error (*kernel)(const Params&, void*, int64_t), const std::decay_t<Params>& params, void* workspace,
          int64_t, const std::string& what) {
  if (const cuda::Error error = kernel(params, workspace, 0)) fail(what, error.kernel, error.message);
}
void* pixel_workspace(Memory& memory, const Problem& problem) {
  const int64_t *z = problem.logits.size, *y = problem.labels.size;
  return memory.workspace(cuda::pixel_workspace(z[0], z[1], z[2], z[3], y[1], y[2], problem.align_corners));
}
void* image_workspace(Memory& memory, int64_t n, int64_t numel) {
  return memory.workspace(cuda::image_workspace(n, numel));
}
#endif

template <class S>
void run(DType dtype, DType wide, int64_t C, int64_t h, int64_t w, int64_t H, int64_t W, Shifted shifted,
         bool channels_last = false) {
  const bool align_corners = shifted == Shifted::kMaps;
  const int64_t N = 2;
  const std::string what = std::to_string(h) + " x " + std::to_string(w) + " to " + std::to_string(H) + " x " +
                           std::to_string(W) + ", dtype " + std::to_string(static_cast<int>(dtype));
  Memory memory;
  memory.aligned = shifted != Shifted::kInputs;
  const auto logits = [&](int64_t gap = 0) {
    TensorView view = memory.tensor(dtype, {N, C, h, w + gap});
    view.size[3] = w;
    if (channels_last) view.stride[1] = 1, view.stride[2] = w * C, view.stride[3] = C;
    return view;
  };
  const TensorView given = logits(shifted == Shifted::kRows), grad = logits();
  Problem problem{given, memory.tensor(DType::kUInt8, {N, H, W}), grad, 255, align_corners};
  memory.aligned = shifted != Shifted::kMaps;
  fill<S>(problem.logits, N * C * h * w);
  uint8_t* labels = static_cast<uint8_t*>(problem.labels.data);
  for (int64_t i = 0; i < N * H * W; ++i) labels[i] = static_cast<uint8_t>(i % 11 == 0 ? 255 : i % C);
  const int64_t bad = N * H * W - 1;
  labels[bad] = static_cast<uint8_t>(C);  // on a GPU the second image becomes NaN
  const auto map = [&] { return memory.tensor(wide, {N, H, W}); };
  const auto vector = [&](DType type) { return memory.tensor(type, {N}); };
  void* const workspace = pixel_workspace(memory, problem);
  const TensorView runner_up = memory.tensor(DType::kUInt8, {N, H, W}), sum = vector(wide);
  call(kernels::margin, {problem, map(), runner_up, sum, vector(DType::kInt64)}, workspace, bad, what);
#if !defined(SANITIZE_CPU)
  const Compute<S>* sums = static_cast<const Compute<S>*>(sum.data);
  if (!std::isfinite(sums[0]) || !std::isnan(sums[1])) fail(what, "margin", "other sums than expected");
#endif
  call(kernels::margin_backward, {problem, runner_up, map()}, workspace, bad, what);
  for (Loss loss : {Loss::kCrossEntropy, Loss::kSegPGD, Loss::kCosPGD}) {
    CrossEntropyParams params{};
    params.problem = problem;
    params.loss = loss;
    params.lambda = 0.25;
    params.pixel_loss = map(), params.shift = map(), params.scale = map(), params.pixel_weight = map();
    params.loss_sum = vector(wide), params.weight_sum = vector(wide), params.n_valid = vector(DType::kInt64);
    params.class_weight = memory.tensor(wide, {N, C});
    call(kernels::cross_entropy, params, workspace, bad, what);
    call(kernels::cross_entropy_backward,
         {problem, params.pixel_loss, params.shift, params.scale, params.class_weight, params.pixel_weight},
         workspace, bad, what);
  }
  problem.grad = {};
  for (bool per_image : {false, true}) {
    const int64_t images = per_image ? N : 1;
    const TensorView prediction = memory.tensor(DType::kUInt8, {N, H, W});
    call(kernels::confusion,
         {problem, prediction, memory.tensor(DType::kInt64, {images, C, C}), per_image,
          memory.tensor(DType::kInt32, {images, 3, C * C + 1}), memory.tensor(DType::kInt64, {1})},
         nullptr, bad, what);
  }
}

// One of the tensors begins one element behind a multiple of 16 bytes, or none: a kernel that looks at the others alone
// takes vectors of what is not aligned.
enum class Tensor { kNone, kGrad, kImages, kOrigin, kResult };

template <class S>
void run_steps(DType dtype, DType wide, int64_t n, int64_t numel, Tensor shifted) {
  Memory memory;
  const auto like_images = [&](Tensor which) {
    memory.aligned = which != shifted;
    const TensorView view = memory.tensor(dtype, {n, numel});
    memory.aligned = true;
    return view;
  };
  const TensorView grad = like_images(Tensor::kGrad), out = like_images(Tensor::kResult);
  const TensorView norm = memory.tensor(wide, {n});
  fill<S>(grad, n * numel);
  void* workspace = image_workspace(memory, n, numel);
  const std::string what = std::to_string(n) + " x " + std::to_string(numel);
  call(kernels::l1_norm, {n, numel, grad, norm}, workspace, -1, what);
  call(kernels::scale_gradient, {n, numel, grad, norm, out}, nullptr, -1, what);
  if constexpr (std::is_same_v<S, Compute<S>>) {
    const TensorView images = like_images(Tensor::kImages), origin = like_images(Tensor::kOrigin);
    const TensorView gain = memory.tensor(dtype, {n}), eps = memory.tensor(dtype, {n});
    call(kernels::newton_step, {n, numel, images, grad, gain, out, eps, norm, 0, 1, 0.5, true}, workspace, -1, what);
    call(kernels::sign_step, {n, numel, images, grad, origin, out, 0.1, 0.1, gain, {}, 0, 1}, nullptr, -1, what);
  }
}

template <class S>
void run_all(DType dtype, DType wide) {
  const int64_t sizes[][4] = {{6, 8, 6, 8},  {5, 7, 5, 7}, {3, 5, 24, 37}, {33, 40, 5, 9},
                              {1, 1, 70, 3}, {3, 64, 5, 61}, {6, 33, 26, 133}};
  for (const auto& size : sizes)
    for (Shifted shifted : {Shifted::kNone, Shifted::kInputs, Shifted::kMaps, Shifted::kRows})
      run<S>(dtype, wide, 5, size[0], size[1], size[2], size[3], shifted);
  for (int64_t classes : {5, 16, 70})
    for (int64_t width : {8, 7})
      for (Shifted shifted : {Shifted::kNone, Shifted::kInputs})
        run<S>(dtype, wide, classes, 6, width, 6, width, shifted, true);
  for (int64_t numel : {1, 64, 4099, 8192})
    for (Tensor shifted : {Tensor::kNone, Tensor::kGrad, Tensor::kImages, Tensor::kOrigin, Tensor::kResult})
      run_steps<S>(dtype, wide, 3, numel, shifted);
}

}  // namespace

int main() {
  run_all<float>(DType::kFloat32, DType::kFloat32);
  run_all<double>(DType::kFloat64, DType::kFloat64);
  run_all<Half>(DType::kFloat16, DType::kFloat32);
  run_all<BFloat16>(DType::kBFloat16, DType::kFloat32);
  std::puts("done");
  return 0;
}
