// Sums over a block, over the blocks of an image: in a fixed order, so that they have the same bits on every run.
#pragma once

#include "cuda/launch.cuh"

namespace segadv::cuda {

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;  // in every lane
}

// The sum over the block, in every thread. All threads of the block must call it.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ T of_warp[kWarps];
  value = warp_sum(value);
  __syncthreads();  // of_warp may still be read by a sum before this one
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = 0;
  for (int i = 0; i < kWarps; ++i) total += of_warp[i];
  return total;
}

// What the blocks of an image leave: the sum of an image's `count` numbers, in every thread.
template <class To, class T>
__device__ __forceinline__ To sum_of_partials(const T* partial, int count) {
  To total = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) total += static_cast<To>(partial[i]);
  return block_sum(total);
}

}  // namespace segadv::cuda
