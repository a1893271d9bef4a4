// Python's way in: tensors come as (address, dtype, sizes, strides) or None, nothing is returned but the position of a
// bad label (-1: none). The GIL is released around the work; a C++ exception becomes a Python one.
#include <pybind11/pybind11.h>

#include "segadv.h"

#ifdef _OPENMP
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

Problem problem(const py::handle& logits, const py::handle& labels, const py::handle& grad, int64_t ignore_index,
                bool align_corners) {
  return {view(logits), view(labels), view(grad), ignore_index, align_corners};
}

template <class Params>
int64_t run(int64_t (*kernel)(const Params&), const Params& params) {
  py::gil_scoped_release released;
  return kernel(params);
}

}  // namespace

PYBIND11_MODULE(_segadv_native, m) {
  m.attr("interface_version") = kInterfaceVersion;
  m.attr("version") = SEGADV_VERSION;
  m.attr("compiler") = SEGADV_COMPILER;
#ifdef _OPENMP
  m.attr("openmp") = _OPENMP;
  m.def("max_threads", [] { return omp_get_max_threads(); });
#endif
  m.def("instruction_set", [] { return cpu::instruction_set(); });

  m.def("margin", [](py::handle logits, py::handle labels, py::handle grad, int64_t ignore_index, bool align_corners,
                     py::handle margin, py::handle runner_up, py::handle gain_sum, py::handle n_valid) {
    return run(cpu::margin, MarginParams{problem(logits, labels, grad, ignore_index, align_corners), view(margin),
                                         view(runner_up), view(gain_sum), view(n_valid)});
  });
  m.def("margin_backward", [](py::handle logits, py::handle labels, py::handle grad, int64_t ignore_index,
                              bool align_corners, py::handle runner_up, py::handle grad_margin) {
    return run(cpu::margin_backward,
               MarginBackwardParams{problem(logits, labels, grad, ignore_index, align_corners), view(runner_up),
                                    view(grad_margin)});
  });
  m.def("cross_entropy",
        [](py::handle logits, py::handle labels, py::handle grad, int64_t ignore_index, bool align_corners, int loss,
           double lambda, bool targeted, py::handle class_weight, py::handle pixel_loss, py::handle largest,
           py::handle log_normalizer, py::handle pixel_weight, py::handle loss_sum, py::handle weight_sum, py::handle n_valid) {
          return run(cpu::cross_entropy,
                     CrossEntropyParams{problem(logits, labels, grad, ignore_index, align_corners),
                                        static_cast<Loss>(loss), lambda, targeted, view(class_weight),
                                        view(pixel_loss), view(largest), view(log_normalizer), view(pixel_weight),
                                        view(loss_sum), view(weight_sum), view(n_valid)});
        });
  m.def("cross_entropy_backward",
        [](py::handle logits, py::handle labels, py::handle grad, int64_t ignore_index, bool align_corners,
           py::handle grad_loss, py::handle largest, py::handle log_normalizer, py::handle class_weight,
           py::handle pixel_weight) {
          return run(cpu::cross_entropy_backward,
                     CrossEntropyBackwardParams{problem(logits, labels, grad, ignore_index, align_corners),
                                                view(grad_loss), view(largest), view(log_normalizer),
                                                view(class_weight), view(pixel_weight)});
        });
  m.def("l1_norm", [](int64_t n, int64_t numel, py::handle grad, py::handle norm) {
    return run(cpu::l1_norm, L1NormParams{n, numel, view(grad), view(norm)});
  });
  m.def("newton_step",
        [](int64_t n, int64_t numel, py::handle images, py::handle grad, py::handle gain, py::handle adversarial,
           py::handle eps, py::handle norm, double low, double high, double max_eps, bool clamp_negative) {
          return run(cpu::newton_step,
                     NewtonStepParams{n, numel, view(images), view(grad), view(gain), view(adversarial), view(eps),
                                      view(norm), low, high, max_eps, clamp_negative});
        });
  m.def("sign_step", [](int64_t n, int64_t numel, py::handle images, py::handle grad, py::handle origin,
                        py::handle adversarial, double alpha, double eps, py::handle alpha_per_image,
                        py::handle eps_per_image, double low, double high) {
    return run(cpu::sign_step, SignStepParams{n, numel, view(images), view(grad), view(origin), view(adversarial),
                                              alpha, eps, view(alpha_per_image), view(eps_per_image), low, high});
  });
  m.def("confusion", [](py::handle logits, py::handle labels, int64_t ignore_index, bool align_corners,
                        py::handle prediction, py::handle matrix, bool per_image) {
    return run(cpu::confusion, ConfusionParams{problem(logits, labels, py::none(), ignore_index, align_corners),
                                               view(prediction), view(matrix), per_image});
  });
}
