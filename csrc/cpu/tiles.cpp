// The parts of a walk over tiles that do not depend on the kernel: labels, class maps, conversion, resampling along x.
#include "cpu/tiles.h"

namespace segadv::cpu {
namespace {

template <class L>
SEGADV_CLONES int load_labels_as(const L* labels, int64_t stride, int count, int64_t num_classes,
                                 int64_t ignore_index, int32_t* y, int* first_bad) {
  int valid = 0, bad = 0;
  for (int p = 0; p < count; ++p) {
    const int64_t label = labels[p * stride];
    const bool in_range = (label >= 0) & (label < num_classes);
    const bool ignored = label == ignore_index;
    const bool is_valid = in_range & !ignored;
    y[p] = is_valid ? static_cast<int32_t>(label) : -1;
    valid += is_valid;
    bad |= (!in_range & !ignored) ? 1 : 0;
  }
  *first_bad = count;
  if (bad) {
    for (int p = count - 1; p >= 0; --p) {
      const int64_t label = labels[p * stride];
      if ((label < 0 || label >= num_classes) && label != ignore_index) *first_bad = p;
    }
  }
  return valid;
}

template <class A>
SEGADV_CLONES void expand_clones(const A* row, int64_t width, int64_t classes, const Columns<A>& columns, A* to,
                                 int64_t to_stride) {
  const int32_t *x0 = columns.x0, *x1 = columns.x1;
  const A* weight = columns.weight;
  const int count = columns.count;
  for (int64_t c = 0; c < classes; ++c) {
    const A* from = row + c * width;
    A* out = to + c * to_stride;
    SEGADV_SIMD
    for (int p = 0; p < count; ++p) out[p] = (A(1) - weight[p]) * from[x0[p]] + weight[p] * from[x1[p]];
  }
}

template <class A>
SEGADV_CLONES void contract_clones(const A* from, int64_t from_stride, int64_t classes, const Columns<A>& columns,
                                   A* row, int64_t width) {
  const int32_t *x0 = columns.x0, *x1 = columns.x1;
  const A* weight = columns.weight;
  const int count = columns.count;
  for (int p = 0; p < count;) {
    int end = p + 1;
    while (end < count && x0[end] == x0[p]) ++end;
    for (int64_t c = 0; c < classes; ++c) {
      const A* in = from + c * from_stride;
      A left = 0, right = 0;
      for (int i = p; i < end; ++i) {
        left += (A(1) - weight[i]) * in[i];
        right += weight[i] * in[i];
      }
      row[c * width + x0[p]] += left;
      row[c * width + x1[p]] += right;
    }
    p = end;
  }
}

template <class S>
SEGADV_CLONES void load_clones(const S* from, int64_t class_stride, int64_t pixel_stride, int64_t classes,
                               int64_t count, Compute<S>* to, int64_t to_stride) {
  if (class_stride == 1 && pixel_stride != 1) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < classes; ++c) to[c * to_stride + p] = to_compute(from[p * pixel_stride + c]);
  } else if (pixel_stride == 1) {
    for (int64_t c = 0; c < classes; ++c) {
      SEGADV_SIMD
      for (int64_t p = 0; p < count; ++p) to[c * to_stride + p] = to_compute(from[c * class_stride + p]);
    }
  } else {
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t p = 0; p < count; ++p)
        to[c * to_stride + p] = to_compute(from[c * class_stride + p * pixel_stride]);
  }
}

template <class S>
SEGADV_CLONES void store_clones(const Compute<S>* from, int64_t from_stride, int64_t classes, int64_t count, S* to,
                                int64_t class_stride, int64_t pixel_stride) {
  if (class_stride == 1 && pixel_stride != 1) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < classes; ++c) to[p * pixel_stride + c] = from_compute<S>(from[c * from_stride + p]);
  } else if (pixel_stride == 1) {
    for (int64_t c = 0; c < classes; ++c) {
      SEGADV_SIMD
      for (int64_t p = 0; p < count; ++p) to[c * class_stride + p] = from_compute<S>(from[c * from_stride + p]);
    }
  } else {
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t p = 0; p < count; ++p)
        to[c * class_stride + p * pixel_stride] = from_compute<S>(from[c * from_stride + p]);
  }
}

}  // namespace

int load_labels(const Problem& problem, int64_t n, int64_t row, int64_t column, int count, int32_t* y,
                int64_t* first_bad) {
  const TensorView& labels = problem.labels;
  const int64_t classes = problem.logits.size[1], stride = labels.stride[2], ignore = problem.ignore_index;
  int bad = 0, valid = 0;
  switch (labels.dtype) {
    case DType::kInt64:
      valid = load_labels_as(at<int64_t>(labels, n, row, column), stride, count, classes, ignore, y, &bad);
      break;
    case DType::kInt32:
      valid = load_labels_as(at<int32_t>(labels, n, row, column), stride, count, classes, ignore, y, &bad);
      break;
    case DType::kInt16:
      valid = load_labels_as(at<int16_t>(labels, n, row, column), stride, count, classes, ignore, y, &bad);
      break;
    case DType::kUInt8:
      valid = load_labels_as(at<uint8_t>(labels, n, row, column), stride, count, classes, ignore, y, &bad);
      break;
    default: throw std::invalid_argument("segadv: integer labels are needed");
  }
  if (bad < count) {
    *first_bad = std::min(*first_bad, (n * labels.size[1] + row) * labels.size[2] + column + bad);
  }
  return valid;
}

void store_classes(const TensorView& map, int64_t n, int64_t row, int64_t column, int count, const int32_t* classes) {
  if (map.dtype == DType::kUInt8) {
    std::copy_n(classes, count, at<uint8_t>(map, n, row, column));
  } else {
    std::copy_n(classes, count, at<int16_t>(map, n, row, column));
  }
}

void load_classes(const TensorView& map, int64_t n, int64_t row, int64_t column, int count, int32_t* classes) {
  if (map.dtype == DType::kUInt8) {
    std::copy_n(at<uint8_t>(map, n, row, column), count, classes);
  } else {
    std::copy_n(at<int16_t>(map, n, row, column), count, classes);
  }
}

template <class S>
void load_block(const S* from, int64_t class_stride, int64_t pixel_stride, int64_t classes, int64_t count,
                Compute<S>* to, int64_t to_stride) {
  load_clones(from, class_stride, pixel_stride, classes, count, to, to_stride);
}
template <class S>
void store_block(const Compute<S>* from, int64_t from_stride, int64_t classes, int64_t count, S* to,
                 int64_t class_stride, int64_t pixel_stride) {
  store_clones<S>(from, from_stride, classes, count, to, class_stride, pixel_stride);
}
template <class A>
void expand(const A* row, int64_t width, int64_t classes, const Columns<A>& columns, A* to, int64_t to_stride) {
  expand_clones(row, width, classes, columns, to, to_stride);
}
template <class A>
void contract(const A* from, int64_t from_stride, int64_t classes, const Columns<A>& columns, A* row, int64_t width) {
  contract_clones(from, from_stride, classes, columns, row, width);
}

#define SEGADV_INSTANTIATE_BLOCKS(S)                                                                              \
  template void load_block<S>(const S*, int64_t, int64_t, int64_t, int64_t, Compute<S>*, int64_t);                \
  template void store_block<S>(const Compute<S>*, int64_t, int64_t, int64_t, S*, int64_t, int64_t);
SEGADV_INSTANTIATE_BLOCKS(float)
SEGADV_INSTANTIATE_BLOCKS(double)
SEGADV_INSTANTIATE_BLOCKS(Half)
SEGADV_INSTANTIATE_BLOCKS(BFloat16)
#undef SEGADV_INSTANTIATE_BLOCKS

#define SEGADV_INSTANTIATE_COLUMNS(A)                                                                             \
  template void expand<A>(const A*, int64_t, int64_t, const Columns<A>&, A*, int64_t);                            \
  template void contract<A>(const A*, int64_t, int64_t, const Columns<A>&, A*, int64_t);
SEGADV_INSTANTIATE_COLUMNS(float)
SEGADV_INSTANTIATE_COLUMNS(double)
#undef SEGADV_INSTANTIATE_COLUMNS

}  // namespace segadv::cpu
