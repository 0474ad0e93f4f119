// What goes around the library's product of a linear layer with scale and residual: residual + scale * product, and
// backward.
//
// Work: csrc/common/columns.cuh. Forward fuses scale and sum, which eager does in two passes with two fresh tensors.
// Backward scales the gradient for the products and sums the bias's and the scale's gradients on the way: for each
// block, then over the blocks in order, so that results repeat. 3 elements moved each, 2 and 5 FLOPs: bound by memory.
// 1024 x 1024 pixels at batch 1, 16 bits, either direction: 75 MB for 65536 x 192, 38 for 16384 x 384, 19 for
// 4096 x 768, 9 for 1024 x 1536.
#pragma once

#include "common/columns.cuh"

namespace mra::cuda {

// y may be product.
template <class T, int kCount>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks)
    linear_scale_residual_kernel(const T* product, const T* __restrict__ scale, const T* __restrict__ residual, T* y,
                                 int channels, Runs runs) {
  const ColumnRun run = ColumnRun::mine<kCount>(runs, channels);
  if (run.column >= channels) return;
  const T* const inputs[] = {product, residual};
  const Floats<kCount> factor = load<kCount>(scale + run.column);
  for_each_row<kCount>(run, channels, inputs, [&](int64_t, int64_t offset, const Floats<kCount>(&v)[2]) {
    Floats<kCount> out;
#pragma unroll
    for (int j = 0; j < kCount; ++j) out.values[j] = fmaf(factor.values[j], v[0].values[j], v[1].values[j]);
    store<kCount>(y + offset, out);
  });
}

// product: null where no gradient of the scale is wanted. partial: [runs, 2, C], for the bias and the scale; or null.
template <class T, int kCount>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks)
    linear_scale_residual_backward_kernel(const T* __restrict__ grad_y, const T* __restrict__ scale,
                                          const T* __restrict__ product, T* __restrict__ grad_product,
                                          float* __restrict__ partial, int channels, Runs runs) {
  const ColumnRun run = ColumnRun::mine<kCount>(runs, channels);
  const T* const inputs[] = {grad_y, product};
  Floats<kCount> factor = {};
  if (run.column < channels) factor = load<kCount>(scale + run.column);
  ColumnSums<kColumnThreads, kCount, 1, 2> sums;
  for_each_row<kCount>(run, channels, inputs, [&](int64_t, int64_t offset, const Floats<kCount>(&v)[2]) {
    Floats<kCount> scaled;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      scaled.values[j] = v[0].values[j] * factor.values[j];
      sums.values[0][0][j] += scaled.values[j];
      sums.values[1][0][j] = fmaf(v[0].values[j], v[1].values[j], sums.values[1][0][j]);
    }
    store<kCount>(grad_product + offset, scaled);
  });
  if (partial != nullptr) write_partial(sums, run, channels, partial);
}

}  // namespace mra::cuda
