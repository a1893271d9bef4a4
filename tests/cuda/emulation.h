// CUDA kernels executed on the CPU, for tests: what csrc/cuda/*.cu need of CUDA, so that the host's compiler builds the
// same files. Not fast, and no model of a GPU's memory: what it shows is what a kernel computes.
//
// The threads of a block are fibers of one CPU thread. A fiber runs until it waits (at __syncthreads, or at a shuffle
// or a vote for the other lanes of its warp); which one runs next is drawn at random, and so is the order of the
// blocks. So code that relies on an order it has not asked for, because a barrier is missing, gives another result for
// another seed. A thread that ends, or waits elsewhere, while others wait for it is an error.
#pragma once

#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)

struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx, gridDim;

namespace segadv::emulation {

#if defined(SEGADV_PTX)
constexpr int kThreads = 128;  // of a block, as on a GPU
#else
constexpr int kThreads = 64;
#endif
constexpr size_t kStack = size_t{256} << 10;
constexpr unsigned kLanes = 32;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Fiber {
  ucontext_t context;
  State state = State::kReady;
  unsigned exchanges = 0;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;
};

struct Warp {
  unsigned arrived = 0, rank = 0;
  const char* what = nullptr;  // the exchange for which lanes have arrived
  uint64_t values[2][kLanes];  // alternating: a lane is at most one exchange ahead of the others
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  unsigned current = 0;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
};

inline Block block;
inline std::mutex mutex;
inline std::string message;
inline uint64_t random_state = 1;

inline void seed(uint64_t value) { random_state = 2 * value + 1; }

inline unsigned random_below(unsigned bound) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<unsigned>((random_state * 0x2545f4914f6cdd1dull >> 32) % bound);
}

// Both are told to AddressSanitizer, which otherwise takes a foreign stack for an overflow.
inline void to_fiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack.get(), kStack);
#endif
  swapcontext(&block.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void to_scheduler(Fiber& fiber, State state) {
  fiber.state = state;
#if defined(__SANITIZE_ADDRESS__)
  // A fiber that is done gives its fake stack back.
  __sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &fiber.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_size);
#endif
  swapcontext(&fiber.context, &block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
#endif
  try {
    (*block.body)();
  } catch (...) {
    block.error = std::current_exception();
  }
  to_scheduler(block.fibers[block.current], State::kDone);
}

// From here to the next barrier: the warps one after the other in random order, each as far as it comes, or all mixed.
inline void draw_ranks() {
  const unsigned count = static_cast<unsigned>(block.warps.size());
  const bool mixed = random_below(2) == 0;
  for (unsigned i = 0; i < count; ++i) {
    const unsigned other = random_below(i + 1);
    block.warps[i].rank = block.warps[other].rank;
    block.warps[other].rank = i;
  }
  for (Warp& warp : block.warps) warp.rank = mixed ? 0 : warp.rank;
}

inline void run_block(unsigned threads) {
  block.warps.assign(threads / kLanes, {});
  for (Fiber& fiber : block.fibers) {
    fiber.state = State::kReady;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::vector<unsigned> ready;
  draw_ranks();
  for (;;) {
    if (block.error) std::rethrow_exception(block.error);
    ready.clear();
    unsigned done = 0, at_barrier = 0, first = ~0u;
    for (unsigned i = 0; i < threads; ++i) {
      const State state = block.fibers[i].state;
      done += state == State::kDone;
      at_barrier += state == State::kAtBarrier;
      const unsigned rank = block.warps[i / kLanes].rank;
      if (state != State::kReady || rank > first) continue;
      if (rank < first) ready.clear();
      first = rank;
      ready.push_back(i);
    }
    if (!ready.empty()) {
      block.current = threadIdx.x = ready[random_below(static_cast<unsigned>(ready.size()))];
      to_fiber(block.fibers[block.current]);
    } else if (done == threads) {
      return;
    } else if (at_barrier == threads) {
      for (Fiber& fiber : block.fibers) fiber.state = State::kReady;
      draw_ranks();
    } else {
      throw std::runtime_error(std::to_string(done) + " threads of block " + std::to_string(blockIdx.x) +
                               " ended and " + std::to_string(threads - done - at_barrier) +
                               " wait for their warp, " + std::to_string(at_barrier) + " wait at a barrier");
    }
  }
}

// Null, or what went wrong; a copy of the message stays until the next call.
template <class Body>
const char* run(const char* kernel, unsigned blocks, unsigned threads, Body&& body) {
  const std::lock_guard<std::mutex> lock(mutex);
  const std::function<void()> function = body;
  block.body = &function;
  block.error = nullptr;
  block.fibers.resize(threads);
  gridDim.x = blocks;
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  try {
    for (unsigned left = blocks; left > 0; --left) {
      std::swap(order[left - 1], order[random_below(left)]);
      blockIdx.x = order[left - 1];
      run_block(threads);
    }
  } catch (const std::exception& error) {
    message = std::string(kernel) + ": " + error.what();
    return message.c_str();
  }
  return nullptr;
}

#if defined(SEGADV_PTX)

// What is compiled here of a kernel is then its address only: someone else, who has it as PTX, is told of the launch.
// (address in this library, blocks, threads of a block, parameters as a GPU gets them)
inline std::function<void(uintptr_t, unsigned, unsigned, const std::string&)> on_launch;

template <class T>
void append(std::string& bytes, const T& value) {
  bytes.resize((bytes.size() + alignof(T) - 1) / alignof(T) * alignof(T));
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

template <class... Parameters, class... Arguments>
const char* launch(const char*, void (*kernel)(Parameters...), unsigned blocks, const Arguments&... arguments) {
  std::string parameters;
  (append<Parameters>(parameters, arguments), ...);
  Dl_info library;
  dladdr(reinterpret_cast<void*>(kernel), &library);
  on_launch(reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase), blocks, kThreads,
            parameters);
  return nullptr;
}

#else

template <class... Parameters, class... Arguments>
const char* launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, const Arguments&... arguments) {
  return run(name, blocks, kThreads, [&] { kernel(arguments...); });
}

#endif

// Hands in a value and waits for the whole warp, whose lanes must all do the same; gives what all of them handed in.
template <class T>
const uint64_t* exchange(const char* what, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fiber& fiber = block.fibers[block.current];
  const unsigned first = block.current / kLanes * kLanes;
  Warp& warp = block.warps[block.current / kLanes];
  if (warp.arrived == 0) warp.what = what;
  if (std::strcmp(warp.what, what) != 0)
    throw std::runtime_error(std::string("lanes of a warp wait at ") + warp.what + ", another one at " + what);
  uint64_t* values = warp.values[fiber.exchanges++ % 2];
  std::memcpy(&values[block.current - first], &value, sizeof(T));
  if (++warp.arrived < kLanes) {
    to_scheduler(fiber, State::kAtExchange);
  } else {
    warp.arrived = 0;
    for (unsigned i = first; i < first + kLanes; ++i) block.fibers[i].state = State::kReady;
    // The last to arrive need not be the first to go on.
    to_scheduler(fiber, State::kReady);
  }
  return values;
}

template <class T>
T from_lane(const uint64_t* values, unsigned lane) {
  T result;
  std::memcpy(&result, &values[lane], sizeof(T));
  return result;
}

}  // namespace segadv::emulation

inline void __syncthreads() {
  using namespace segadv::emulation;
  to_scheduler(block.fibers[block.current], State::kAtBarrier);
}

inline void __syncwarp() { segadv::emulation::exchange("__syncwarp", 0); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const uint64_t* values = segadv::emulation::exchange("__shfl_xor_sync", value);
  return segadv::emulation::from_lane<T>(values, threadIdx.x % 32 ^ static_cast<unsigned>(mask));
}

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const uint64_t* values = segadv::emulation::exchange("__shfl_down_sync", value);
  const unsigned lane = threadIdx.x % 32;
  return segadv::emulation::from_lane<T>(values, lane + delta < 32 ? lane + delta : lane);
}

inline int __all_sync(unsigned, int predicate) {
  const uint64_t* values = segadv::emulation::exchange("__all_sync", uint64_t{predicate != 0});
  return std::all_of(values, values + 32, [](uint64_t value) { return value != 0; });
}

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
