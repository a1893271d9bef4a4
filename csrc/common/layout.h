// Of the walks over tensors on the CPU and on GPUs.
#pragma once

#include <cstdint>

#include "segadv.h"

namespace segadv {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows follow each other without a gap, so that an image is one long row.
inline bool rows_join(const TensorView& view, int row_dim) {
  return !view || view.stride[row_dim] == view.stride[row_dim + 1] * view.size[row_dim + 1];
}

}  // namespace segadv
