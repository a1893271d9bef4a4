// The parts of a walk over tiles that do not depend on the kernel: labels, class maps, conversion, rivals.
#include "cpu/tiles.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/up_tiles.h"

namespace segadv::cpu {
namespace {

template <class L>
SEGADV_INLINE int load_labels_as(const L* labels, int64_t stride, int count, int64_t num_classes,
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

// to[i * to_stride + j] = from[j * from_stride + i] for rows x columns elements of `to`, in squares of 4 x 4 that
// change places in registers. The last squares overlap those before them.
template <class A>
SEGADV_INLINE void transpose(const A* from, int64_t from_stride, A* to, int64_t to_stride, int64_t rows,
                             int64_t columns) {
  constexpr int64_t kSize = 4;
  if (rows < kSize || columns < kSize) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[i * to_stride + j] = from[j * from_stride + i];
    return;
  }
  for (int64_t row = 0; row < rows; row += kSize) {
    for (int64_t column = 0; column < columns; column += kSize) {
      const int64_t i = std::min(row, rows - kSize), j = std::min(column, columns - kSize);
      const A* source = from + j * from_stride + i;
      A* target = to + i * to_stride + j;
#if defined(SEGADV_HAVE_VECTORS)
      typedef A Vector __attribute__((vector_size(kSize * sizeof(A))));
      Vector v[kSize];
      for (int k = 0; k < kSize; ++k) std::memcpy(&v[k], source + k * from_stride, sizeof(Vector));
      const Vector low01 = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5);
      const Vector high01 = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
      const Vector low23 = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
      const Vector high23 = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
      v[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
      v[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
      v[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
      v[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
      for (int k = 0; k < kSize; ++k) std::memcpy(target + k * to_stride, &v[k], sizeof(Vector));
#else
      for (int k = 0; k < kSize; ++k)
        for (int l = 0; l < kSize; ++l) target[k * to_stride + l] = source[l * from_stride + k];
#endif
    }
  }
}

// Where the classes of a pixel are neighbours (channels_last), some pixels at a time pass through a buffer
// [pixel][class], so that memory is read and written in order, and converted in runs that are long whatever the number
// of classes.
constexpr int64_t kPixels = 16, kClasses = 192;

// Calls each(first pixel, first class, pixels, classes, runs): `runs` is 1 where all that is one piece of memory.
template <class F>
SEGADV_INLINE void for_each_group(int64_t classes, int64_t count, int64_t pixel_stride, F&& each) {
  for (int64_t p = 0; p < count; p += kPixels) {
    const int64_t pixels = std::min(kPixels, count - p);
    for (int64_t c = 0; c < classes; c += kClasses) {
      const int64_t some = std::min(kClasses, classes - c);
      each(p, c, pixels, some, pixel_stride == some ? 1 : pixels);
    }
  }
}

template <class S>
SEGADV_INLINE void load_body(const S* from, int64_t class_stride, int64_t pixel_stride, int64_t classes,
                               int64_t count, Compute<S>* to, int64_t to_stride) {
  if (class_stride == 1) {
    Compute<S> buffer[kPixels * kClasses];
    for_each_group(classes, count, pixel_stride, [&](auto p, auto c, auto pixels, auto some, auto runs) SEGADV_BODY {
      const int64_t run = pixels / runs * some;
      for (int64_t r = 0; r < runs; ++r) {
        const S* source = from + (p + r) * pixel_stride + c;
        for (int64_t i = 0; i < run; i += 64 / sizeof(S)) __builtin_prefetch(source + kPixels * pixel_stride + i);
        SEGADV_SIMD
        for (int64_t i = 0; i < run; ++i) buffer[r * run + i] = to_compute(source[i]);
      }
      transpose(buffer, some, to + c * to_stride + p, to_stride, some, pixels);
    });
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
SEGADV_INLINE void store_body(const Compute<S>* from, int64_t from_stride, int64_t classes, int64_t count, S* to,
                                int64_t class_stride, int64_t pixel_stride) {
  if (class_stride == 1) {
    Compute<S> buffer[kPixels * kClasses];
    for_each_group(classes, count, pixel_stride, [&](auto p, auto c, auto pixels, auto some, auto runs) SEGADV_BODY {
      const int64_t run = pixels / runs * some;
      transpose(from + c * from_stride + p, from_stride, buffer, some, pixels, some);
      for (int64_t r = 0; r < runs; ++r) {
        S* target = to + (p + r) * pixel_stride + c;
        SEGADV_SIMD
        for (int64_t i = 0; i < run; ++i) target[i] = from_compute<S>(buffer[r * run + i]);
      }
    });
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

template <class A>
SEGADV_INLINE bool all_finite_body(const A* values, int64_t count) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += values[i] - values[i];
  return sum == A(0);
}

template <class A>
SEGADV_INLINE void mark_rivals_body(const A* upper, const A* lower, int64_t stride, int64_t columns, int64_t classes,
                                      int rivals, uint8_t* mark) {
  for (int64_t x = 0; x < columns; x += kLanes) {
    const A *u = upper + x, *l = lower + x;
    // The classes whose mean of four logits is largest, and the lower one of the two at each of the four.
    A first[kLanes], second[kLanes], bound00[kLanes], bound01[kLanes], bound10[kLanes], bound11[kLanes];
    int32_t first_class[kLanes], second_class[kLanes];
    for (int p = 0; p < kLanes; ++p) {
      first[p] = second[p] = -std::numeric_limits<A>::infinity();
      first_class[p] = second_class[p] = 0;
    }
    for (int64_t c = 0; c < classes; ++c) {
      const A *uc = u + c * stride, *lc = l + c * stride;
      const int32_t k = static_cast<int32_t>(c);
      SEGADV_SIMD
      for (int p = 0; p < kLanes; ++p) {
        const A sum = (uc[p] + uc[p + 1]) + (lc[p] + lc[p + 1]);
        const A old = first[p], old_second = second[p];
        const int32_t old_class = first_class[p], old_second_class = second_class[p];
        const bool leads = sum > old, follows = sum > old_second;
        first[p] = leads ? sum : old;
        first_class[p] = leads ? k : old_class;
        second[p] = leads ? old : (follows ? sum : old_second);
        second_class[p] = leads ? old_class : (follows ? k : old_second_class);
      }
    }
    for (int p = 0; p < kLanes; ++p) {
      const int64_t a = first_class[p] * stride + p, b = (rivals > 1 ? second_class[p] : first_class[p]) * stride + p;
      bound00[p] = std::min(u[a], u[b]), bound01[p] = std::min(u[a + 1], u[b + 1]);
      bound10[p] = std::min(l[a], l[b]), bound11[p] = std::min(l[a + 1], l[b + 1]);
    }
    for (int64_t c = 0; c < classes; ++c) {
      const A *uc = u + c * stride, *lc = l + c * stride;
      uint8_t* to = mark + c * columns + x;
      SEGADV_SIMD
      for (int p = 0; p < kLanes; ++p) {
        const A z00 = uc[p], z01 = uc[p + 1], z10 = lc[p], z11 = lc[p + 1], sum = (z00 + z01) + (z10 + z11);
        const bool below = (z00 < bound00[p]) & (z01 < bound01[p]) & (z10 < bound10[p]) & (z11 < bound11[p]);
        to[p] = !(below & (sum - sum == A(0)));
      }
    }
  }
}

template <int kTaps, class A>
SEGADV_INLINE void expand_body(const A* upper, const A* lower, int64_t stride, const int32_t* classes, int count,
                               const A* weight, int columns, A* t0, A* t1) {
  for (int i = 0; i < count; ++i, t0 += kLanes, t1 += kLanes) {
    const A *from0 = upper + classes[i] * stride, *from1 = lower + classes[i] * stride;
    const auto add_taps = [&](int j0, auto first) SEGADV_BODY {
      const A* of_taps = weight + j0 * kLanes;
      A z0[kTaps], z1[kTaps];
      for (int j = 0; j < kTaps; ++j) z0[j] = from0[j0 + j], z1[j] = from1[j0 + j];
      SEGADV_SIMD
      for (int p = 0; p < kLanes; ++p) {
        A s0 = first ? A(0) : t0[p], s1 = first ? A(0) : t1[p];
        for (int j = 0; j < kTaps; ++j) {
          s0 += of_taps[j * kLanes + p] * z0[j];
          s1 += of_taps[j * kLanes + p] * z1[j];
        }
        t0[p] = s0;
        t1[p] = s1;
      }
    };
    add_taps(0, std::true_type());
    for (int j0 = kTaps; j0 < columns; j0 += kTaps) add_taps(j0, std::false_type());
  }
}

template <class A>
SEGADV_INLINE int add_body(const A* g0, const A* g1, const int32_t* classes, int first, int count, const A* weight,
                           int columns, A* upper, A* lower, int64_t stride) {
  for (int i = first; i < count; ++i) {
    const A *from0 = g0 + i * kLanes, *from1 = g1 + i * kLanes;
    A *to0 = upper + classes[i] * stride, *to1 = lower + classes[i] * stride;
    for (int j0 = 0; j0 < columns; j0 += kGroup) {
      const A* of_group = weight + j0 * kLanes;
      // Pixels in two halves: one sum would wait for itself.
      A s0[kGroup] = {}, s1[kGroup] = {}, more0[kGroup] = {}, more1[kGroup] = {};
      for (int p = 0, q = kLanes / 2; q < kLanes; ++p, ++q) {
        SEGADV_SIMD
        for (int j = 0; j < kGroup; ++j) {
          s0[j] += of_group[p * kGroup + j] * from0[p];
          s1[j] += of_group[p * kGroup + j] * from1[p];
          more0[j] += of_group[q * kGroup + j] * from0[q];
          more1[j] += of_group[q * kGroup + j] * from1[q];
        }
      }
      SEGADV_SIMD
      for (int j = 0; j < kGroup; ++j) {
        s0[j] += more0[j];
        s1[j] += more1[j];
      }
      // Every sum has all pixels in it: one that is not finite is seen in the first.
      if (j0 == 0 && !std::isfinite(s0[0] + s1[0])) return i;
      SEGADV_SIMD
      for (int j = 0; j < kGroup; ++j) to0[j0 + j] += s0[j];
      SEGADV_SIMD
      for (int j = 0; j < kGroup; ++j) to1[j0 + j] += s1[j];
    }
  }
  return count;
}

}  // namespace

int load_labels(const Problem& problem, int64_t n, int64_t row, int64_t column, int count, int32_t* y,
                int64_t* first_bad) {
  const TensorView& labels = problem.labels;
  const int64_t classes = problem.logits.size[1], stride = labels.stride[2], ignore = problem.ignore_index;
  int bad = 0, valid = 0;
  const auto load = [&](auto tag) {
    const auto* own = at<decltype(tag)>(labels, n, row, column);
    on_this_cpu([&]() SEGADV_BODY { valid = load_labels_as(own, stride, count, classes, ignore, y, &bad); });
  };
  switch (labels.dtype) {
    case DType::kInt64: load(int64_t()); break;
    case DType::kInt32: load(int32_t()); break;
    case DType::kInt16: load(int16_t()); break;
    case DType::kUInt8: load(uint8_t()); break;
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
  on_this_cpu([&]() SEGADV_BODY { load_body(from, class_stride, pixel_stride, classes, count, to, to_stride); });
}
template <class S>
void store_block(const Compute<S>* from, int64_t from_stride, int64_t classes, int64_t count, S* to,
                 int64_t class_stride, int64_t pixel_stride) {
  on_this_cpu([&]() SEGADV_BODY { store_body<S>(from, from_stride, classes, count, to, class_stride, pixel_stride); });
}
template <class A>
bool all_finite(const A* values, int64_t count) {
  return on_this_cpu([&]() SEGADV_BODY { return all_finite_body(values, count); });
}
template <class A>
void mark_rivals(const A* upper, const A* lower, int64_t stride, int64_t columns, int64_t classes, int rivals,
                 uint8_t* mark) {
  on_this_cpu([&]() SEGADV_BODY { mark_rivals_body(upper, lower, stride, columns, classes, rivals, mark); });
}

template <class A>
void expand_classes(const A* upper, const A* lower, int64_t stride, const int32_t* classes, int count,
                    const A* weight, int columns, A* t0, A* t1) {
  on_this_cpu([&]() SEGADV_BODY {
    if (taps_at_once(columns) == 4) {
      expand_body<4>(upper, lower, stride, classes, count, weight, columns, t0, t1);
    } else {
      expand_body<6>(upper, lower, stride, classes, count, weight, columns, t0, t1);
    }
  });
}
template <class A>
int add_classes(const A* g0, const A* g1, const int32_t* classes, int first, int count, const A* weight, int columns,
                A* upper, A* lower, int64_t stride) {
  return on_this_cpu([&]() SEGADV_BODY {
    return add_body(g0, g1, classes, first, count, weight, columns, upper, lower, stride);
  });
}

#define SEGADV_INSTANTIATE_BLOCKS(S)                                                                              \
  template void load_block<S>(const S*, int64_t, int64_t, int64_t, int64_t, Compute<S>*, int64_t);                \
  template void store_block<S>(const Compute<S>*, int64_t, int64_t, int64_t, S*, int64_t, int64_t);
SEGADV_INSTANTIATE_BLOCKS(float)
SEGADV_INSTANTIATE_BLOCKS(double)
SEGADV_INSTANTIATE_BLOCKS(Half)
SEGADV_INSTANTIATE_BLOCKS(BFloat16)
#undef SEGADV_INSTANTIATE_BLOCKS

template bool all_finite<float>(const float*, int64_t);
template bool all_finite<double>(const double*, int64_t);
template void mark_rivals<float>(const float*, const float*, int64_t, int64_t, int64_t, int, uint8_t*);
template void mark_rivals<double>(const double*, const double*, int64_t, int64_t, int64_t, int, uint8_t*);

#define SEGADV_INSTANTIATE_CLASSES(A)                                                                               \
  template void expand_classes<A>(const A*, const A*, int64_t, const int32_t*, int, const A*, int, A*, A*);         \
  template int add_classes<A>(const A*, const A*, const int32_t*, int, int, const A*, int, A*, A*, int64_t);
SEGADV_INSTANTIATE_CLASSES(float)
SEGADV_INSTANTIATE_CLASSES(double)
#undef SEGADV_INSTANTIATE_CLASSES

}  // namespace segadv::cpu
