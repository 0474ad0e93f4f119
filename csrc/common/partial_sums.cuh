// The second stage of a sum over rows: each block has written what its rows give, and these parts are added in their
// order, so that the sums repeat bit for bit.
#pragma once

#include "common/elements.cuh"
#include "common/launch_cuda.h"

namespace mra::cuda {

constexpr int kPartialColumns = 32, kPartialSlices = 16;

// out[o][g, c] = sum over p of partial[g, p, o, c]. A null out[o] is left alone.
template <class Out, int kOutputs>
struct PartialSums {
  const float* partial;  // [groups, parts, kOutputs, C]
  int parts, channels;
  Out* out[kOutputs];  // [groups, C] each
  int64_t groups = 1;
};

// One block for 32 columns of one output of one group (grid: [groups * C / 32, kOutputs]). A row of threads sums every
// 16th part.
template <class Out, int kOutputs>
__global__ void __launch_bounds__(kPartialColumns* kPartialSlices)
    sum_partials_kernel(const __grid_constant__ PartialSums<Out, kOutputs> sums) {
  __shared__ float slices[kPartialSlices][kPartialColumns];
  const unsigned tiles = (sums.channels + kPartialColumns - 1) / kPartialColumns;
  const int64_t group = blockIdx.x / tiles;
  const int c = static_cast<int>(blockIdx.x % tiles * kPartialColumns + threadIdx.x);
  const int64_t stride = static_cast<int64_t>(kOutputs) * sums.channels;
  float total = 0;
  if (c < sums.channels) {
    const float* column = sums.partial + (group * sums.parts * kOutputs + blockIdx.y) * sums.channels + c;
#pragma unroll 8
    for (int p = threadIdx.y; p < sums.parts; p += kPartialSlices) total += column[p * stride];
  }
  slices[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  Out* out = sums.out[blockIdx.y];
  if (threadIdx.y > 0 || c >= sums.channels || out == nullptr) return;
  total = 0;
#pragma unroll
  for (int slice = 0; slice < kPartialSlices; ++slice) total += slices[slice][threadIdx.x];
  from_float(total, out[group * sums.channels + c]);
}

template <class Out, int kOutputs>
void sum_partials(const PartialSums<Out, kOutputs>& sums, cudaStream_t stream) {
  const int64_t tiles = (sums.channels + kPartialColumns - 1) / kPartialColumns;
  const dim3 grid(static_cast<unsigned>(tiles * sums.groups), kOutputs);
  MRA_LAUNCH((sum_partials_kernel<Out, kOutputs>), grid, dim3(kPartialColumns, kPartialSlices), 0, stream, sums);
}

}  // namespace mra::cuda
