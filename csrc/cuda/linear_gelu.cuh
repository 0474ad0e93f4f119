// What goes around the library's product of a linear layer with GELU: the activation, its weighted mean, and backward.
//
// Work: csrc/common/columns.cuh. Forward reads the product and writes the activation (which may be the same memory),
// and sums its mean on the way: 2 elements moved each, about 20 instructions in 16 bits, 25 in float32. Backward turns
// the activation's gradient, and its mean's, into the product's, and sums the bias's gradient: 3 elements, about 35
// instructions. Bound by memory: 27 instructions issue while an H200 moves 4 bytes an element. 1024 x 1024 pixels at
// batch 1, N = 4 C, 16 bits: 201 MB forward for 65536 x 768, 101 for 16384 x 1536, 50 for 4096 x 3072, 25 for 1024 x
// 6144; backward half as much again.
//
// Means and the bias's gradient are added up in fixed order, for each block and then over the blocks: results repeat.
#pragma once

#include "common/columns.cuh"
#include "common/gelu.cuh"

namespace mra::cuda {

// Groups are pictures where there is a mean, otherwise all rows are one. product may be y; partial: [groups * runs, C],
// null without a mean.
template <class T, int kCount>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks)
    linear_gelu_kernel(const T* product, T* y, const float* __restrict__ mean_weights, float* __restrict__ partial,
                       int channels, Runs runs) {
  const ColumnRun run = ColumnRun::mine<kCount>(runs, channels);
  const T* const inputs[] = {product};
  ColumnSums<kColumnThreads, kCount, 1, 1> sums;
  for_each_row<kCount>(run, channels, inputs, [&](int64_t row, int64_t offset, const Floats<kCount>(&v)[1]) {
    Elements<T, kCount> out;
#pragma unroll
    for (int j = 0; j < kCount; ++j) from_float(gelu<T>(v[0].values[j]), out.values[j]);
    *reinterpret_cast<Elements<T, kCount>*>(y + offset) = out;
    if (partial == nullptr) return;
    const float weight = mean_weights[row - run.group * runs.rows];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      sums.values[0][0][j] = fmaf(weight, to_float(out.values[j]), sums.values[0][0][j]);
    }
  });
  if (partial != nullptr) write_partial(sums, run, channels, partial);
}

// Groups as above. grad_y or grad_y_mean may be null; partial: [groups * runs, C], or null.
template <class T, int kCount>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks)
    linear_gelu_backward_kernel(const T* __restrict__ grad_y, const float* __restrict__ grad_y_mean,
                                const T* __restrict__ product, const float* __restrict__ mean_weights,
                                T* __restrict__ grad_product, float* __restrict__ partial, int channels, Runs runs) {
  const ColumnRun run = ColumnRun::mine<kCount>(runs, channels);
  const T* const inputs[] = {product, grad_y};
  Floats<kCount> of_mean = {};
  if (grad_y_mean != nullptr && run.column < channels) {
    of_mean = load<kCount>(grad_y_mean + run.group * channels + run.column);
  }
  ColumnSums<kColumnThreads, kCount, 1, 1> sums;
  for_each_row<kCount>(run, channels, inputs, [&](int64_t row, int64_t offset, const Floats<kCount>(&v)[2]) {
    const float weight = grad_y_mean != nullptr ? mean_weights[row - run.group * runs.rows] : 0.0f;
    Floats<kCount> grad;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      grad.values[j] = fmaf(weight, of_mean.values[j], v[1].values[j]) * gelu_slope(v[0].values[j]);
      sums.values[0][0][j] += grad.values[j];
    }
    store<kCount>(grad_product + offset, grad);
  });
  if (partial != nullptr) write_partial(sums, run, channels, partial);
}

}  // namespace mra::cuda
