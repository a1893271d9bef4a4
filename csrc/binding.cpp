// Python's way in: tensors come as (address, dtype, sizes, strides) or None, nothing is returned but the position of a
// bad label (-1: none). The GIL is released around the work; a C++ exception becomes a Python one.
//
// The functions of the GPU have the same names and arguments, with the workspace's address and the stream added, in the
// submodule `cuda`. They return nothing; an error of a launch becomes an exception that names the kernel and the sizes.
// With SEGADV_EMULATED this file is the tests' module of the emulated kernels, which has these functions alone.
#include <pybind11/pybind11.h>

#include <sstream>

#include "segadv.h"

#if defined(SEGADV_EMULATED)
#include "emulation.h"
#else
#include <omp.h>
#endif

namespace py = pybind11;
using namespace segadv;

namespace {

TensorView view(const py::handle& given) {
  TensorView result;
  if (given.is_none()) return result;
  const py::tuple parts = py::reinterpret_borrow<py::tuple>(given);
  if (parts.size() != 4) throw py::type_error("a tensor is (address, dtype, sizes, strides)");
  result.data = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
  result.dtype = static_cast<DType>(parts[1].cast<int32_t>());
  const py::tuple size = parts[2], stride = parts[3];
  if (size.size() > 4) throw py::type_error("a tensor of at most 4 dimensions is needed");
  for (size_t i = 0; i < size.size(); ++i) {
    result.size[i] = size[i].cast<int64_t>();
    result.stride[i] = stride[i].cast<int64_t>();
  }
  return result;
}

// --- arguments, in the order of Python's ---

using Tensor = py::handle;

Problem problem(Tensor logits, Tensor labels, Tensor grad, int64_t ignore_index, bool align_corners) {
  return {view(logits), view(labels), view(grad), ignore_index, align_corners};
}

MarginParams margin(Tensor logits, Tensor labels, Tensor grad, int64_t ignore_index, bool align_corners, Tensor margin,
                    Tensor runner_up, Tensor gain_sum, Tensor n_valid) {
  return {problem(logits, labels, grad, ignore_index, align_corners), view(margin), view(runner_up), view(gain_sum),
          view(n_valid)};
}

MarginBackwardParams margin_backward(Tensor logits, Tensor labels, Tensor grad, int64_t ignore_index,
                                     bool align_corners, Tensor runner_up, Tensor grad_margin) {
  return {problem(logits, labels, grad, ignore_index, align_corners), view(runner_up), view(grad_margin)};
}

CrossEntropyParams cross_entropy(Tensor logits, Tensor labels, Tensor grad, int64_t ignore_index, bool align_corners,
                                 int loss, double lambda, bool targeted, Tensor class_weight, Tensor pixel_loss,
                                 Tensor shift, Tensor scale, Tensor pixel_weight, Tensor loss_sum,
                                 Tensor weight_sum, Tensor n_valid) {
  return {problem(logits, labels, grad, ignore_index, align_corners), static_cast<Loss>(loss), lambda, targeted,
          view(class_weight), view(pixel_loss), view(shift), view(scale), view(pixel_weight),
          view(loss_sum), view(weight_sum), view(n_valid)};
}

CrossEntropyBackwardParams cross_entropy_backward(Tensor logits, Tensor labels, Tensor grad, int64_t ignore_index,
                                                  bool align_corners, Tensor grad_loss, Tensor shift,
                                                  Tensor scale, Tensor class_weight, Tensor pixel_weight) {
  return {problem(logits, labels, grad, ignore_index, align_corners), view(grad_loss), view(shift),
          view(scale), view(class_weight), view(pixel_weight)};
}

L1NormParams l1_norm(int64_t n, int64_t numel, Tensor grad, Tensor norm) { return {n, numel, view(grad), view(norm)}; }

NewtonStepParams newton_step(int64_t n, int64_t numel, Tensor images, Tensor grad, Tensor gain, Tensor adversarial,
                             Tensor eps, Tensor norm, double low, double high, double max_eps, bool clamp_negative) {
  return {n, numel, view(images), view(grad), view(gain), view(adversarial), view(eps), view(norm), low, high,
          max_eps, clamp_negative};
}

SignStepParams sign_step(int64_t n, int64_t numel, Tensor images, Tensor grad, Tensor origin, Tensor adversarial,
                         double alpha, double eps, Tensor alpha_per_image, Tensor eps_per_image, double low,
                         double high) {
  return {n, numel, view(images), view(grad), view(origin), view(adversarial), alpha, eps, view(alpha_per_image),
          view(eps_per_image), low, high};
}

ScaleGradientParams scale_gradient(int64_t n, int64_t numel, Tensor grad, Tensor factor, Tensor scaled) {
  return {n, numel, view(grad), view(factor), view(scaled)};
}

ConfusionParams confusion(Tensor logits, Tensor labels, int64_t ignore_index, bool align_corners, Tensor prediction,
                          Tensor matrix, bool per_image, Tensor counts, Tensor invalid) {
  return {problem(logits, labels, py::none(), ignore_index, align_corners), view(prediction), view(matrix), per_image,
          view(counts), view(invalid)};
}

// --- functions ---

#if !defined(SEGADV_EMULATED)
template <class Params, class... Arguments>
void define(py::module_& m, const char* name, Params (*params)(Arguments...), int64_t (*kernel)(const Params&)) {
  m.def(name, [=](Arguments... arguments, int threads) {
    const Params given = params(arguments...);
    py::gil_scoped_release released;
    // Differs from torch's own only in a thread where torch has not run in parallel yet, or where OpenMP is not torch's
    // library (clang's).
    if (omp_get_max_threads() != threads) omp_set_num_threads(threads);
    return kernel(given);
  });
}
#endif

#if defined(SEGADV_CUDA) || defined(SEGADV_EMULATED)
std::string sizes(const Problem& problem) {
  std::ostringstream text;
  const int64_t *z = problem.logits.size, *y = problem.labels.size;
  text << "logits [" << z[0] << ", " << z[1] << ", " << z[2] << ", " << z[3] << "], labels [" << y[0] << ", " << y[1]
       << ", " << y[2] << "]";
  return text.str();
}
template <class Params>
auto sizes(const Params& params) -> decltype(sizes(params.problem)) {
  return sizes(params.problem);
}
template <class Params>
auto sizes(const Params& params) -> decltype(std::to_string(params.numel)) {
  return std::to_string(params.n) + " images of " + std::to_string(params.numel) + " elements";
}

template <class Params, class... Arguments>
void define(py::module_& m, const char* name, Params (*params)(Arguments...),
            cuda::Error (*kernel)(const Params&, void*, int64_t)) {
  m.def(name, [=](Arguments... arguments, uintptr_t workspace, int64_t stream) {
    const Params given = params(arguments...);
    cuda::Error error;
    {
      py::gil_scoped_release released;
      error = kernel(given, reinterpret_cast<void*>(workspace), stream);
    }
    if (error) {
      throw std::runtime_error(std::string("segadv: the CUDA kernel ") + error.kernel + " failed for " +
                               sizes(given) + ": " + error.message + " (cudaError " + std::to_string(error.code) +
                               ")");
    }
  });
}

void define_cuda(py::module_ m) {
  m.def("check", []() -> py::object {
    const cuda::Error error = cuda::check();
    return error ? py::object(py::str(error.message)) : py::none();
  });
  m.def("pixel_workspace", cuda::pixel_workspace);
  m.def("image_workspace", cuda::image_workspace);
  define(m, "margin", margin, cuda::margin);
  define(m, "margin_backward", margin_backward, cuda::margin_backward);
  define(m, "cross_entropy", cross_entropy, cuda::cross_entropy);
  define(m, "cross_entropy_backward", cross_entropy_backward, cuda::cross_entropy_backward);
  define(m, "l1_norm", l1_norm, cuda::l1_norm);
  define(m, "newton_step", newton_step, cuda::newton_step);
  define(m, "sign_step", sign_step, cuda::sign_step);
  define(m, "scale_gradient", scale_gradient, cuda::scale_gradient);
  define(m, "confusion", confusion, cuda::confusion);
}
#endif

}  // namespace

#if defined(SEGADV_EMULATED)

PYBIND11_MODULE(_segadv_emulated, m) {
  define_cuda(m);
  m.def("seed", emulation::seed);
#if defined(SEGADV_PTX)
  m.def("on_launch", [](const py::function& told) {
    auto* kept = new py::function(told);  // never freed: at the end of the process there is no interpreter any more
    emulation::on_launch = [kept](uintptr_t kernel, unsigned blocks, unsigned threads, const std::string& parameters) {
      const py::gil_scoped_acquire held;
      (*kept)(kernel, blocks, threads, py::bytes(parameters));
    };
  });
#endif
}

#else

PYBIND11_MODULE(_segadv_native, m) {
  m.attr("interface_version") = kInterfaceVersion;
  m.attr("version") = SEGADV_VERSION;
  m.attr("sources") = SEGADV_SOURCES;
  m.attr("compiler") = SEGADV_COMPILER;
  m.attr("openmp") = _OPENMP;
  m.def("instruction_sets", [] {
    py::list names;
    for (const std::string& name : cpu::instruction_sets()) names.append(name);
    return names;
  });
  m.def("instruction_set", cpu::instruction_set);
  m.def("use_instruction_set", cpu::use_instruction_set);
  define(m, "margin", margin, cpu::margin);
  define(m, "margin_backward", margin_backward, cpu::margin_backward);
  define(m, "cross_entropy", cross_entropy, cpu::cross_entropy);
  define(m, "cross_entropy_backward", cross_entropy_backward, cpu::cross_entropy_backward);
  define(m, "l1_norm", l1_norm, cpu::l1_norm);
  define(m, "newton_step", newton_step, cpu::newton_step);
  define(m, "sign_step", sign_step, cpu::sign_step);
  define(m, "scale_gradient", scale_gradient, cpu::scale_gradient);
  define(m, "confusion", confusion, cpu::confusion);
#if defined(SEGADV_CUDA)
  py::module_ gpu = m.def_submodule("cuda");
  gpu.attr("compiler") = SEGADV_CUDA_COMPILER;
  gpu.attr("architectures") = SEGADV_CUDA_ARCHITECTURES;
  define_cuda(gpu);
#endif
}

#endif
