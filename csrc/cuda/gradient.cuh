// The gradient of the losses with respect to the logits, from what the forward kept of every pixel.
#pragma once

#include "common/softmax.h"
#include "cuda/pixels.cuh"

namespace segadv::cuda {

// Views without data are not given, or have no pixels.
struct GradientInputs {
  bool margin = false;          // of margins; otherwise of cross-entropy
  TensorView runner_up{};       // [N, H, W] for margins; cross-entropy needs
  TensorView shift{};           // [N, H, W] and
  TensorView scale{};           // [N, H, W]
  TensorView grad_loss{};       // [N, H, W] of any strides, or none: 1
  TensorView class_weight{};    // [N, C], or none
  TensorView pixel_weight{};    // [N, H, W], or none
};

// Multiplies what belongs to a thread's pixels by the weights [N, C] of their classes; what is not valid stays.
template <class Mine, int P = Mine::kPixels, class A = typename Mine::A>
__device__ __forceinline__ void multiply_by_class_weight(const TensorView& class_weight, const Mine& pixels,
                                                         const int32_t (&label)[P], A (&value)[P]) {
  const A* of_image = at<const A>(class_weight, scaled(pixels.n, class_weight.stride[0]));
#pragma unroll
  for (int i = 0; i < P; ++i) {
    if (label[i] >= 0) value[i] *= of_image[label[i]];
  }
}

// +value at the label, -value at the runner-up, 0 elsewhere; label and runner-up are -1 where not valid.
template <class A>
__device__ __forceinline__ A margin_gradient(int32_t c, int32_t label, int32_t runner_up, A value) {
  return label == c ? value : (runner_up == c ? -value : A(0));
}

// value * (softmax - onehot), 0 where not valid (also where z is NaN); factor = value * scale.
template <class A>
__device__ __forceinline__ A cross_entropy_gradient(int32_t c, int32_t label, A z, A shift, A factor, A value) {
  const A g = exp_nonpositive(z - shift) * factor - (label == c ? value : A(0));
  return label >= 0 ? g : A(0);
}

// Fills problem.grad of logits that are resampled. Bad labels are counted by the kernel that made the inputs.
Error resampled_gradient(const Problem& problem, const GradientInputs& inputs, int64_t stream);

// Fills problem.grad; NaN where an image has a bad label.
Error gradient(const Problem& problem, const GradientInputs& inputs, void* workspace, int64_t stream);

}  // namespace segadv::cuda
