// The whole native surface of segadv: plain-data parameters and the functions that take them.
//
// Nothing here knows torch. A TensorView is a pointer with sizes and strides in elements; the caller allocates every
// output. A view whose data is null is an output that is not wanted (or an option that is not given). Every element
// of a wanted output is written, on every path.
//
// Names of sizes: N images, C classes, h x w the logits' own size, H x W the labels' size. Where (h, w) differs from
// (H, W), the logits are resampled bilinearly on the fly (common/bilinear.h); full-resolution logits never exist.
//
// On the CPU every function returns the flat row-major position in labels [N, H, W] of the first label that is neither
// a class in [0, C) nor ignore_index, or -1. The outputs are then meaningless. On a GPU, where nothing waits for the
// kernels, floating results of an image with such a label become NaN.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace segadv {

// The Python side refuses an extension with another number.
constexpr int kInterfaceVersion = 8;

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16, kInt64, kInt32, kInt16, kUInt8 };

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 0};  // in elements
  explicit operator bool() const { return data != nullptr; }
};

// Logits and labels, and how they meet. Floating outputs have the compute type: float, or double for double logits.
struct Problem {
  TensorView logits;  // [N, C, h, w] float32, float64, float16, bfloat16; only its sizes are read by margin_backward
  TensorView labels;  // [N, H, W] int64, int32, int16, uint8; without data every pixel counts as unlabelled
  TensorView grad;    // [N, C, h, w] of the logits' type, or none
  int64_t ignore_index = 255;
  bool align_corners = false;
};

// --- margin (cpu/margin.cpp) ---

// Serves pixel_margin, averaged_gain and gain_and_grad.
struct MarginParams {
  Problem problem;       // grad: gradient of the sum of margins, +1 at the label, -1 at the runner-up
  TensorView margin;     // [N, H, W]
  TensorView runner_up;  // [N, H, W] uint8 or int16
  TensorView gain_sum;   // [N]
  TensorView n_valid;    // [N] int64
};

struct MarginBackwardParams {
  Problem problem;         // logits without data; grad wanted
  TensorView runner_up;    // [N, H, W] uint8 or int16
  TensorView grad_margin;  // [N, H, W] of the compute type, any strides (0 for one number per image)
};

// --- cross-entropy and its weighted relatives (cpu/cross_entropy.cpp) ---

enum class Loss : int32_t { kCrossEntropy, kSegPGD, kCosPGD };

// Serves cross_entropy, segpgd_loss, cospgd_loss and loss_and_grad.
struct CrossEntropyParams {
  Problem problem;  // grad: gradient of the loss summed over pixels
  Loss loss = Loss::kCrossEntropy;
  double lambda = 0.0;        // SegPGD
  bool targeted = false;      // SegPGD, CosPGD
  TensorView class_weight;    // [N, C] of the compute type, dense along C, or none
  TensorView pixel_loss;      // [N, H, W]
  TensorView shift;           // [N, H, W]: a logit not far below the largest, and ...
  TensorView scale;           // [N, H, W]: ... 1 / sum of exp(z - shift): softmax is scale * exp(z - shift)
  TensorView pixel_weight;    // [N, H, W]: SegPGD's or CosPGD's weight, times that of the class
  TensorView loss_sum;        // [N]
  TensorView weight_sum;      // [N]: sum of the pixels' weights
  TensorView n_valid;         // [N] int64
};

struct CrossEntropyBackwardParams {
  Problem problem;            // grad wanted
  TensorView grad_loss;       // [N, H, W] of the compute type, any strides
  TensorView shift, scale;    // [N, H, W]
  TensorView class_weight;    // [N, C], or none
  TensorView pixel_weight;    // [N, H, W], or none
};

// --- steps in pixel space, and what else takes images as rows (cpu/step.cpp) ---

// Images as N rows of `numel` elements, all dense in the same order.
struct L1NormParams {
  int64_t n = 0, numel = 0;
  TensorView grad;  // any floating type
  TensorView norm;  // [N] of the compute type
};

struct NewtonStepParams {
  int64_t n = 0, numel = 0;
  TensorView images, grad;      // float32 or float64
  TensorView gain;              // [N] of the images' type
  TensorView adversarial;       // like the images
  TensorView eps, norm;         // [N] of the images' type
  double low = 0.0, high = 1.0;
  double max_eps = -1.0;        // negative: no cap
  bool clamp_negative = false;
};

struct SignStepParams {
  int64_t n = 0, numel = 0;
  TensorView images, grad;      // float32 or float64
  TensorView origin;            // like the images, or none: no ball
  TensorView adversarial;       // like the images
  double alpha = 0.0, eps = 0.0;
  TensorView alpha_per_image;   // [N] instead of alpha, or none
  TensorView eps_per_image;     // [N] instead of eps, or none
  double low = 0.0, high = 1.0;
};

// What a backward makes of a gradient that came with the value.
struct ScaleGradientParams {
  int64_t n = 0, numel = 0;
  TensorView grad;    // any floating type
  TensorView factor;  // [N] of the compute type, any stride
  TensorView scaled;  // like grad
};

// --- predictions (cpu/confusion.cpp) ---

// Serves confusion_matrix and argmax_labels.
struct ConfusionParams {
  Problem problem;
  TensorView prediction;  // [N, H, W] uint8 or int16: argmax over classes at the labels' size, or none
  TensorView matrix;      // [C, C] or [N, C, C] int64, row = label, column = prediction, or none
  bool per_image = false;
  // A GPU alone: with the matrix. It counts in copies, so that the few cells which take most pixels are not the queue
  // for all threads.
  TensorView counts;   // [1 or N, copies, C * C + 1] int32, filled with 0; the last one counts bad labels
  TensorView invalid;  // [] int64: bad labels of all images
};

namespace cpu {

int64_t margin(const MarginParams& params);
int64_t margin_backward(const MarginBackwardParams& params);
int64_t cross_entropy(const CrossEntropyParams& params);
int64_t cross_entropy_backward(const CrossEntropyBackwardParams& params);
int64_t l1_norm(const L1NormParams& params);
int64_t newton_step(const NewtonStepParams& params);
int64_t sign_step(const SignStepParams& params);
int64_t scale_gradient(const ScaleGradientParams& params);
int64_t confusion(const ConfusionParams& params);

// The instruction sets that the kernels can run with on this machine, the best first: "x86-64-v4", "x86-64-v3" and
// "baseline" (what the compiler takes by default: SSE2, Neon); the one they run with, the best; and another one, for
// tests: never beside a running kernel.
std::vector<std::string> instruction_sets();
std::string instruction_set();
void use_instruction_set(const std::string& name);

}  // namespace cpu

// The same on a GPU (cuda/), in the order of a stream: nothing is allocated, nothing waits, the device is the caller's
// current one. `workspace` is memory of at least the number of bytes that the functions below give; its contents mean
// nothing before and after. `stream` is a cudaStream_t. Where the problem resamples and a gradient is wanted, the maps
// that its kernel reads must be given: runner_up of margin; shift and scale of cross_entropy, and
// pixel_weight of its weighted forms.
namespace cuda {

struct Error {
  int code = 0;  // a cudaError_t
  const char* kernel = nullptr;
  const char* message = nullptr;
  explicit operator bool() const { return kernel != nullptr; }
};

// Whether kernels can run at all: the driver is there and new enough for the runtime that is linked in.
Error check();

int64_t pixel_workspace(int64_t N, int64_t C, int64_t h, int64_t w, int64_t H, int64_t W, bool align_corners);
int64_t image_workspace(int64_t n, int64_t numel);

Error margin(const MarginParams& params, void* workspace, int64_t stream);
Error margin_backward(const MarginBackwardParams& params, void* workspace, int64_t stream);
Error cross_entropy(const CrossEntropyParams& params, void* workspace, int64_t stream);
Error cross_entropy_backward(const CrossEntropyBackwardParams& params, void* workspace, int64_t stream);
Error l1_norm(const L1NormParams& params, void* workspace, int64_t stream);
Error newton_step(const NewtonStepParams& params, void* workspace, int64_t stream);
Error sign_step(const SignStepParams& params, void* workspace, int64_t stream);            // no workspace
Error scale_gradient(const ScaleGradientParams& params, void* workspace, int64_t stream);  // no workspace
Error confusion(const ConfusionParams& params, void* workspace, int64_t stream);           // no workspace

}  // namespace cuda
}  // namespace segadv
