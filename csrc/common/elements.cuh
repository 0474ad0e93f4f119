// Element types on the GPU: loading and storing 1 or 16 bytes' worth of them as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mra::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

__device__ __forceinline__ void from_float(float v, float& out) { out = v; }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16& out) { out = __float2bfloat16(v); }
__device__ __forceinline__ void from_float(float v, __half& out) { out = __float2half(v); }

// kCount neighbouring elements, moved as one access of kCount * sizeof(T) bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Elements {
  T values[kCount];
};

template <int kCount>
struct Floats {
  float values[kCount];
};

template <int kCount, class T>
__device__ __forceinline__ Floats<kCount> load(const T* p) {
  const Elements<T, kCount> raw = *reinterpret_cast<const Elements<T, kCount>*>(p);
  Floats<kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; ++i) out.values[i] = to_float(raw.values[i]);
  return out;
}

template <int kCount, class T>
__device__ __forceinline__ void store(T* p, const Floats<kCount>& v) {
  Elements<T, kCount> raw;
#pragma unroll
  for (int i = 0; i < kCount; ++i) from_float(v.values[i], raw.values[i]);
  *reinterpret_cast<Elements<T, kCount>*>(p) = raw;
}

// out += weight * v
template <int kCount>
__device__ __forceinline__ void accumulate(Floats<kCount>& out, float weight, const Floats<kCount>& v) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out.values[i] = fmaf(weight, v.values[i], out.values[i]);
}

// The sum over a block of kThreads threads, in a fixed order; valid in thread 0.
template <int kThreads>
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float warps[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) v += __shfl_down_sync(0xffffffffu, v, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) total += warps[i];
  }
  return total;
}

}  // namespace mra::cuda
