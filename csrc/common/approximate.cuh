// The special function unit's instructions themselves. CUDA's own functions take ten more to be exact for subnormal
// numbers, which here count as zero.
#pragma once

namespace mra::cuda {

// 1 / x, within one unit in the last place.
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x, within two units in the last place.
__device__ __forceinline__ float approximate_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace mra::cuda
