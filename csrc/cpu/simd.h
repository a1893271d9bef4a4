// SEGADV_CLONES: compile a function for the baseline, AVX2 and AVX-512, and choose when the module is loaded. What it
// calls must be inlined (SEGADV_INLINE, SEGADV_BODY), or it would stay at the baseline.
#pragma once

#include "common/dtype.h"

#if defined(SEGADV_HAVE_TARGET_CLONES)
#define SEGADV_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SEGADV_CLONES
#endif

// Behind a lambda's parameter list: what runs inside a clone's loops must be part of the clone.
#if defined(__GNUC__)
#define SEGADV_BODY __attribute__((always_inline))
#else
#define SEGADV_BODY
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SEGADV_HAVE_VECTORS
#endif
#endif

#define SEGADV_SIMD _Pragma("omp simd")

namespace segadv::cpu {

// In float64: the errors of sums of like numbers in float32 are alike, and add up.
template <class A>
SEGADV_INLINE double sum_of(const A* values, int count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int p = 0; p < count; ++p) sum += values[p];
  return sum;
}

}  // namespace segadv::cpu
