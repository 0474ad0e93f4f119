// Small right kernels, one for each thing that the simulator models. The tests break them one place at a time.
#include <cuda_bf16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_simulator/mma.h"

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

// y[row] = sum of x[row, :]: shuffles in a warp, static shared memory between warps.
__global__ void __launch_bounds__(kThreads) row_sums(const float* __restrict__ x, float* __restrict__ y, int columns) {
  __shared__ float warps[kThreads / 32];
  float total = 0;
  for (int i = threadIdx.x; i < columns; i += kThreads) total += x[static_cast<int64_t>(blockIdx.x) * columns + i];
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) total += __shfl_xor_sync(kAll, total, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) y[blockIdx.x] = warps[0] + warps[1];
}

// y[i] = x[n - 1 - i] in each block's stretch of n: dynamic shared memory, written and read as 16 bytes.
__global__ void reverse(const float4* __restrict__ x, float4* __restrict__ y) {
  extern __shared__ __align__(16) float4 stretch[];
  const int n = blockDim.x;
  stretch[threadIdx.x] = x[blockIdx.x * n + threadIdx.x];
  __syncthreads();
  const float4 v = stretch[n - 1 - threadIdx.x];
  y[blockIdx.x * n + threadIdx.x] = make_float4(v.w, v.z, v.y, v.x);
}

// y = sum of `tiles` tiles of kThreads numbers, each fetched with cp.async while the last one is added up. A thread
// adds what its neighbor has fetched.
__global__ void tile_sums(const float* __restrict__ x, float* __restrict__ y, int tiles) {
  __shared__ float buffer[2][kThreads];
  const int neighbor = (threadIdx.x + 1) % kThreads;
  __pipeline_memcpy_async(&buffer[0][threadIdx.x], x + threadIdx.x, sizeof(float));
  __pipeline_commit();
  float total = 0;
  for (int i = 0; i < tiles; ++i) {
    if (i + 1 < tiles) {
      __pipeline_memcpy_async(&buffer[(i + 1) % 2][threadIdx.x], x + (i + 1) * kThreads + threadIdx.x, sizeof(float));
    }
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();  // the tile is there
    total += buffer[i % 2][neighbor];
    __syncthreads();  // the tile may be overwritten
  }
  y[threadIdx.x] = total;
}

// y[i] = x[i] + 1, a grid over n numbers.
__global__ void increment(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  y[i] = x[i] + 1;
}

// y[0] = sum of x, in whatever order the blocks come.
__global__ void atomic_sum(const float* __restrict__ x, float* __restrict__ y) {
  atomicAdd(y, x[blockIdx.x * blockDim.x + threadIdx.x]);
}

// y[i] = sum of x[j] over the lanes j <= i of a warp.
__global__ void prefix_sums(const float* __restrict__ x, float* __restrict__ y) {
  float total = x[threadIdx.x];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float before = __shfl_up_sync(kAll, total, step);
    if (threadIdx.x % 32 >= step) total += before;
  }
  y[threadIdx.x] = total;
}

// y = x x[:8]^T for x: [16, 16] on a tensor core, y: [16, 8].
__global__ void gram(const float* __restrict__ x, float* __restrict__ y) {
  const int group = threadIdx.x / 4, k = threadIdx.x % 4 * 2;
  const auto pair = [&](int row, int column) {
    const unsigned low = __bfloat16_as_ushort(__float2bfloat16(x[row * 16 + column]));
    return low | static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16(x[row * 16 + column + 1]))) << 16;
  };
  const uint32_t a[4] = {pair(group, k), pair(group + 8, k), pair(group, k + 8), pair(group + 8, k + 8)};
  const uint32_t b[2] = {pair(group, k), pair(group, k + 8)};
  float d[4] = {};
  cuda_simulator::mma_m16n8k16<__nv_bfloat16>(d, a, b, d);
  for (int i = 0; i < 4; ++i) y[(group + i / 2 * 8) * 8 + k + i % 2] = d[i];
}

// y = a + 2 a^T of each of four matrices a: [8, 8] below each other, loaded as a tensor core's operands are.
__global__ void symmetric_sums(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ __align__(16) __nv_bfloat16 rows[32][8];
  for (int i = 0; i < 8; ++i) rows[threadIdx.x][i] = __float2bfloat16(x[threadIdx.x * 8 + i]);
  __syncwarp();
  uint32_t plain[4], transposed[4];
  cuda_simulator::ldmatrix_x4(plain, rows[threadIdx.x], false);
  cuda_simulator::ldmatrix_x4(transposed, rows[threadIdx.x], true);
  for (int i = 0; i < 8; ++i) {
    const auto value = [&](const uint32_t (&m)[4]) {
      return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(m[i / 2] >> 16 * (i % 2))));
    };
    y[(i / 2 * 8 + threadIdx.x / 4) * 8 + threadIdx.x % 4 * 2 + i % 2] = value(plain) + 2 * value(transposed);
  }
}

extern "C" {

int run_row_sums(const float* x, float* y, int rows, int columns) {
  row_sums<<<rows, kThreads>>>(x, y, columns);
  return cudaGetLastError();
}

int run_reverse(const float* x, float* y, int rows, int columns) {
  const int bytes = columns * sizeof(float);
  cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  reverse<<<rows, columns / 4, bytes>>>(reinterpret_cast<const float4*>(x), reinterpret_cast<float4*>(y));
  return cudaGetLastError();
}

int run_tile_sums(const float* x, float* y, int rows, int /*columns*/) {
  tile_sums<<<1, kThreads, 0, nullptr>>>(x, y, rows);
  return cudaGetLastError();
}

int run_increment(const float* x, float* y, int rows, int columns) {
  const int n = rows * columns;
  increment<<<dim3((n + kThreads - 1) / kThreads), kThreads>>>(x, y, n);
  return cudaGetLastError();
}

int run_atomic_sum(const float* x, float* y, int rows, int columns) {
  atomic_sum<<<rows, columns>>>(x, y);
  return cudaGetLastError();
}

int run_prefix_sums(const float* x, float* y, int /*rows*/, int columns) {
  prefix_sums<<<1, columns>>>(x, y);
  return cudaGetLastError();
}

int run_gram(const float* x, float* y, int /*rows*/, int /*columns*/) {
  gram<<<1, 32>>>(x, y);
  return cudaGetLastError();
}

int run_symmetric_sums(const float* x, float* y, int /*rows*/, int /*columns*/) {
  symmetric_sums<<<1, 32>>>(x, y);
  return cudaGetLastError();
}

}  // extern "C"
