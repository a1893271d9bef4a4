// How a kernel is started: on the caller's stream and current device, with an error that names it.
//
// Kernels are one-dimensional. For tests the host's compiler builds the same files, with SEGADV_EMULATED and
// tests/cuda/emulation.h in the place of the CUDA runtime: a block's threads are then fibers of one CPU thread. Blocks
// are smaller there, but still of two warps.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/layout.h"
#include "segadv.h"

#if defined(SEGADV_EMULATED)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace segadv::cuda {

#if defined(SEGADV_EMULATED)
constexpr int kThreads = emulation::kThreads;
#else
constexpr int kThreads = 128;
#endif
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class... Parameters, class... Arguments>
Error launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int64_t stream,
             const Arguments&... arguments) {
  if (blocks == 0) return {};
  if (blocks > INT32_MAX) return {1, name, "the tensors are too large: more than 2^31 - 1 blocks"};
#if defined(SEGADV_EMULATED)
  (void)stream;
  const char* message = emulation::launch(name, kernel, static_cast<unsigned>(blocks), arguments...);
  return message == nullptr ? Error{} : Error{1, name, message};
#else
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
  // Also reports what an earlier kernel of this process, not necessarily one of these, has left behind.
  const cudaError_t code = cudaGetLastError();
  return code == cudaSuccess ? Error{} : Error{code, name, cudaGetErrorString(code)};
#endif
}

// --- vectors of up to 16 bytes ---

constexpr int kVectorBytes = 16;

template <class T, int P>
struct alignas(sizeof(T) * P < kVectorBytes ? sizeof(T) * P : kVectorBytes) Pack {
  T values[P];
};

template <int P, class T>
SEGADV_INLINE Pack<T, P> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, P>*>(from);
}

template <int P, class T>
SEGADV_INLINE void store_pack(T* to, const Pack<T, P>& pack) {
  *reinterpret_cast<Pack<T, P>*>(to) = pack;
}

// The same for what nobody reads again soon: it is the first to leave the cache, and what is read twice stays.
template <int P, class T>
SEGADV_INLINE Pack<T, P> load_pack_once(const T* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Pack<T, P>) == kVectorBytes)
    return bit_cast<Pack<T, P>>(__ldcs(reinterpret_cast<const int4*>(from)));
#endif
  return load_pack<P>(from);
}

template <int P, class T>
SEGADV_INLINE void store_pack_once(T* to, const Pack<T, P>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Pack<T, P>) == kVectorBytes) {
    __stcs(reinterpret_cast<int4*>(to), bit_cast<int4>(pack));
    return;
  }
#endif
  store_pack(to, pack);
}

// Elements that a thread takes at once: 16 bytes. float64, which nobody is in a hurry with, one by one.
template <class S>
constexpr int kVector = sizeof(S) < 8 ? kVectorBytes / static_cast<int>(sizeof(S)) : 1;

inline bool is_aligned(const TensorView& view) { return reinterpret_cast<uintptr_t>(view.data) % kVectorBytes == 0; }

}  // namespace segadv::cuda
