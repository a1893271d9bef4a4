// on_this_cpu(f): calls f() compiled for the baseline, for AVX2 or for AVX-512, whichever is the best that the machine
// has. What f calls must be inlined (SEGADV_INLINE, SEGADV_BODY), or it stays at the baseline.
#pragma once

#include "common/dtype.h"

// On x86-64 with g++ or clang. Their target_clones would do the same in one line, but g++ before 12 has it without these
// levels, and clang without templates. Not under the tests' sanitizers: the same accesses, a third of the build time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(SEGADV_EMULATED)
#define SEGADV_HAVE_LEVELS
#define SEGADV_V3 __attribute__((noinline, target("avx2,fma,bmi,bmi2")))
#define SEGADV_V4 __attribute__((noinline, target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")))
#endif

// Behind a lambda's parameter list: it becomes part of the function that calls it, and is compiled as that is.
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

// 4 and 3, for the instructions of x86-64-v4 and v3, or 0.
extern int level;

#if defined(SEGADV_HAVE_LEVELS)
template <class F>
SEGADV_V4 auto on_v4(const F& f) {
  return f();
}
template <class F>
SEGADV_V3 auto on_v3(const F& f) {
  return f();
}
template <class F>
SEGADV_INLINE auto on_this_cpu(const F& f) {
  if (level == 4) return on_v4(f);
  if (level == 3) return on_v3(f);
  return f();
}
#else
template <class F>
SEGADV_INLINE auto on_this_cpu(const F& f) {
  return f();
}
#endif

// In float64: the errors of sums of like numbers in float32 are alike, and add up.
template <class A>
SEGADV_INLINE double sum_of(const A* values, int count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int p = 0; p < count; ++p) sum += values[p];
  return sum;
}

}  // namespace segadv::cpu
