// The tie and NaN rule of the arg-max, in one place: the lowest class index wins ties, and NaN counts as the largest
// (the first NaN wins), as in torch.argmax.
#pragma once

#include "dtype.h"

namespace segadv {

// Whether `value`, of a higher class index than `best`, takes its place.
template <class A>
SEGADV_INLINE bool beats(A value, A best) {
  return !(value <= best) & (best == best);
}

// takes ? a : b, as arithmetic: a plain conditional update of memory would become a masked store, which is slow.
SEGADV_INLINE int32_t select(bool takes, int32_t a, int32_t b) { return b ^ ((a ^ b) & -static_cast<int32_t>(takes)); }
SEGADV_INLINE int64_t select(bool takes, int64_t a, int64_t b) { return b ^ ((a ^ b) & -static_cast<int64_t>(takes)); }
SEGADV_INLINE float select(bool takes, float a, float b) {
  return bit_cast<float>(select(takes, bit_cast<int32_t>(a), bit_cast<int32_t>(b)));
}
SEGADV_INLINE double select(bool takes, double a, double b) {
  return bit_cast<double>(select(takes, bit_cast<int64_t>(a), bit_cast<int64_t>(b)));
}

// The class that a search for the runner-up starts from: the lowest that is not the label.
SEGADV_INLINE int32_t lowest_other_class(int32_t label) { return label == 0 ? 1 : 0; }

}  // namespace segadv
