// Built-in variables, barriers, warp operations, cached loads and stores, atomics.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda_simulator/engine.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// The caller's place in the source, as default arguments.
#define CUDA_SIMULATOR_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_SIMULATOR_HERE) { cuda_simulator::block_barrier(false, {"__syncthreads", file, line}); }
inline int __syncthreads_count(int predicate, CUDA_SIMULATOR_HERE) {
  return cuda_simulator::block_barrier(predicate != 0, {"__syncthreads_count", file, line});
}
inline int __syncthreads_or(int predicate, CUDA_SIMULATOR_HERE) {
  return cuda_simulator::block_barrier(predicate != 0, {"__syncthreads_or", file, line}) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_SIMULATOR_HERE) {
  return cuda_simulator::block_barrier(predicate == 0, {"__syncthreads_and", file, line}) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_SIMULATOR_HERE) {
  cuda_simulator::warp_collective(cuda_simulator::Collective::kSync, mask, 0, 0, {"__syncwarp", file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_SIMULATOR_HERE) {
  return static_cast<unsigned>(cuda_simulator::warp_collective(cuda_simulator::Collective::kBallot, mask,
                                                               predicate != 0, 0, {"__ballot_sync", file, line}));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_SIMULATOR_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_SIMULATOR_HERE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

namespace cuda_simulator {

template <class T>
T shuffle(unsigned mask, T value, int source, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(Collective::kShuffle, mask, bits, source, place);
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

// A segment of `width` lanes begins here.
inline int segment(int width) {
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0) fail("the width of a shuffle is no power of two");
  return lane() & ~(width - 1);
}

}  // namespace cuda_simulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CUDA_SIMULATOR_HERE) {
  return cuda_simulator::shuffle(mask, value, cuda_simulator::segment(width) | (source & (width - 1)),
                                 {"__shfl_sync", file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, CUDA_SIMULATOR_HERE) {
  const int self = cuda_simulator::lane(), source = self ^ lanes;
  return cuda_simulator::shuffle(mask, value, source < cuda_simulator::segment(width) + width ? source : self,
                                 {"__shfl_xor_sync", file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_SIMULATOR_HERE) {
  const int self = cuda_simulator::lane(), source = self + static_cast<int>(delta);
  return cuda_simulator::shuffle(mask, value, source < cuda_simulator::segment(width) + width ? source : self,
                                 {"__shfl_down_sync", file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_SIMULATOR_HERE) {
  const int self = cuda_simulator::lane(), source = self - static_cast<int>(delta);
  return cuda_simulator::shuffle(mask, value, source >= cuda_simulator::segment(width) ? source : self,
                                 {"__shfl_up_sync", file, line});
}
#undef CUDA_SIMULATOR_HERE

// Cache hints change no value.
#define CUDA_SIMULATOR_LOAD(name) \
  template <class T>              \
  T name(const T* p) {            \
    return *p;                    \
  }
#define CUDA_SIMULATOR_STORE(name) \
  template <class T>               \
  void name(T* p, T value) {       \
    *p = value;                    \
  }
CUDA_SIMULATOR_LOAD(__ldg)
CUDA_SIMULATOR_LOAD(__ldca)
CUDA_SIMULATOR_LOAD(__ldcg)
CUDA_SIMULATOR_LOAD(__ldcs)
CUDA_SIMULATOR_LOAD(__ldlu)
CUDA_SIMULATOR_STORE(__stcg)
CUDA_SIMULATOR_STORE(__stcs)
CUDA_SIMULATOR_STORE(__stwb)
CUDA_SIMULATOR_STORE(__stwt)
#undef CUDA_SIMULATOR_LOAD
#undef CUDA_SIMULATOR_STORE

// Counted, so that a test can forbid them: a float's sum depends on the order.
#define CUDA_SIMULATOR_ATOMIC(name, result)                                                             \
  template <class T>                                                                                    \
  T name(T* p, std::common_type_t<T> value) {                                                           \
    cuda_simulator::count_atomic();                                                                     \
    T old, desired;                                                                                     \
    __atomic_load(p, &old, __ATOMIC_RELAXED);                                                           \
    do {                                                                                                \
      desired = result;                                                                                 \
    } while (!__atomic_compare_exchange(p, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)); \
    return old;                                                                                         \
  }
CUDA_SIMULATOR_ATOMIC(atomicAdd, old + value)
CUDA_SIMULATOR_ATOMIC(atomicSub, old - value)
CUDA_SIMULATOR_ATOMIC(atomicMin, value < old ? value : old)
CUDA_SIMULATOR_ATOMIC(atomicMax, old < value ? value : old)
CUDA_SIMULATOR_ATOMIC(atomicExch, value)
CUDA_SIMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef CUDA_SIMULATOR_ATOMIC
template <class T>
T atomicCAS(T* p, std::common_type_t<T> compare, std::common_type_t<T> value) {
  cuda_simulator::count_atomic();
  T old = compare;
  __atomic_compare_exchange(p, &old, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return old;
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[noreturn]] inline void __trap() { cuda_simulator::fail("__trap"); }
