// Bilinear resampling along one axis, exactly the taps of F.interpolate(mode="bilinear"), in one place.
//
// Output position o reads inputs i0 and i1 = min(i0 + 1, in - 1) with weights w0 = 1 - w1 and w1.
// The positions are computed in double and the weights rounded once: never less exact than PyTorch's float32.
//
// i0 never decreases with o. So all outputs that share i0 ("a quad" in two dimensions) are neighbours, and the
// transpose of the resampling, which the gradient needs, is a sum over neighbours: no scatter, no atomics.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace segadv {

struct Tap {
  int64_t i0, i1;
  double w1;
};

SEGADV_INLINE Tap bilinear_tap(int64_t o, int64_t in, int64_t out, bool align_corners) {
  double position;
  if (align_corners) {
    position = out > 1 ? static_cast<double>(o) * static_cast<double>(in - 1) / static_cast<double>(out - 1) : 0.0;
  } else {
    position = (static_cast<double>(o) + 0.5) * static_cast<double>(in) / static_cast<double>(out) - 0.5;
    position = position < 0.0 ? 0.0 : position;
  }
  int64_t i0 = static_cast<int64_t>(position);
  i0 = i0 > in - 1 ? in - 1 : i0;
  const int64_t i1 = i0 + 1 > in - 1 ? in - 1 : i0 + 1;
  return {i0, i1, position - static_cast<double>(i0)};
}

}  // namespace segadv
