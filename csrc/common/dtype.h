// Storage types and their conversion to the compute type (float; double for double), and the dispatch over them.
//
// The 16-bit conversions are integer arithmetic without branches, so that loops over them vectorise on any x86-64. A
// GPU has instructions for them.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "segadv.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SEGADV_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SEGADV_INLINE inline __attribute__((always_inline))
#else
#define SEGADV_INLINE inline
#endif

namespace segadv {

struct Half {
  uint16_t bits = 0;
};
struct BFloat16 {
  uint16_t bits = 0;
};

template <class To, class From>
SEGADV_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

SEGADV_INLINE float to_compute(float x) { return x; }
SEGADV_INLINE double to_compute(double x) { return x; }
SEGADV_INLINE float to_compute(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
SEGADV_INLINE float to_compute(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Normal numbers, infinity and NaN: shift, then rebias (infinity and NaN twice). Subnormals: an exact product.
  const uint32_t rebias = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bit_cast<float>((magnitude < 0x0400u ? subnormal : normal) | sign);
#endif
}

// Rounding to nearest, ties to even; NaN stays NaN.
template <class S>
SEGADV_INLINE S from_compute(Compute<S> x);
template <>
SEGADV_INLINE float from_compute<float>(float x) {
  return x;
}
template <>
SEGADV_INLINE double from_compute<double>(double x) {
  return x;
}
template <>
SEGADV_INLINE BFloat16 from_compute<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t nan = (bits >> 16) | 0x0040u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded >> 16)};
#endif
}
template <>
SEGADV_INLINE Half from_compute<Half>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 shifts the mantissa so that the hardware rounds at the subnormal's last bit.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // from 65520 on; two results chosen one after the other would become a branch
  const uint32_t result = magnitude >= 0x477ff000u ? infinite : finite;
  return {static_cast<uint16_t>(result | sign)};
#endif
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<S>{}) with the storage type of a floating dtype.
template <class F>
decltype(auto) dispatch_floating(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(TypeTag<float>{});
    case DType::kFloat64: return f(TypeTag<double>{});
    case DType::kFloat16: return f(TypeTag<Half>{});
    case DType::kBFloat16: return f(TypeTag<BFloat16>{});
    default: throw std::invalid_argument("segadv: a floating point tensor is needed");
  }
}

// The same for operations on images, which are never half precision.
template <class F>
decltype(auto) dispatch_images(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(TypeTag<float>{});
    case DType::kFloat64: return f(TypeTag<double>{});
    default: throw std::invalid_argument("segadv: float32 or float64 images are needed");
  }
}

}  // namespace segadv
