// What the emulation must find: kernels with mistakes. Prints one line for each.
#include <cstdio>
#include <set>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

using namespace segadv::cuda;

namespace {

template <bool kBarrier>
void reverse_kernel(int* to) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  to[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = -1;
}

// Reads what the next round overwrites, without a barrier between.
template <bool kBarrier>
void rounds_kernel(int* to) {
  __shared__ int of_warp[kThreads / kWarp];
  int wrong = 0;
  for (int round = 0; round < 3; ++round) {
    const int sum = warp_sum(round);
    if (kBarrier) __syncthreads();
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
    __syncthreads();
    for (int value : of_warp) wrong += value != kWarp * round;
  }
  to[threadIdx.x] = wrong == 0 ? kThreads - 1 - static_cast<int>(threadIdx.x) : -1;
}

void leaves_kernel() {
  if (threadIdx.x == 40) return;
  __syncthreads();
}

void other_barrier_kernel(double* to) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    to[threadIdx.x] = warp_sum(1.0);
  }
}

void other_exchange_kernel(double* to) {
  if (threadIdx.x % 2 == 0) {
    to[threadIdx.x] = __all_sync(kAllLanes, 1);
  } else {
    to[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.0, 1);
  }
}

// How many of the seeds give every thread the number of its opposite.
int right(void (*kernel)(int*)) {
  int count = 0;
  for (int seed = 0; seed < 100; ++seed) {
    segadv::emulation::seed(seed);
    int to[kThreads];
    if (launch("reverse", kernel, 1, 0, static_cast<int*>(to))) return -1;
    bool all = true;
    for (int i = 0; i < kThreads; ++i) all = all && to[i] == kThreads - 1 - i;
    count += all;
  }
  return count;
}

}  // namespace

int main() {
  std::printf("%d right with the barrier\n", right(reverse_kernel<true>));
  std::printf("%d right without the barrier\n", right(reverse_kernel<false>));
  std::printf("%d right with the barrier\n", right(rounds_kernel<true>));
  std::printf("%d right without the barrier\n", right(rounds_kernel<false>));
  std::printf("%s\n", launch("leaves", leaves_kernel, 1, 0).message);
  double to[kThreads];
  std::printf("%s\n", launch("other_barrier", other_barrier_kernel, 1, 0, static_cast<double*>(to)).message);
  std::printf("%s\n", launch("other_exchange", other_exchange_kernel, 1, 0, static_cast<double*>(to)).message);
  return 0;
}
