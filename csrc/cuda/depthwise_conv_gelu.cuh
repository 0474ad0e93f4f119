// Depthwise 7x7 convolution, bias and GELU, with the sums over the picture of the output and of the input on the way: a
// thread keeps those of its channel over its strip, and a second stage adds them in order.
#pragma once

#include "common/gelu.cuh"
#include "cuda/depthwise_conv7.cuh"

namespace mra::cuda {

// partial: [B, strips * column tiles * groups, 2, C], the shares of the means of y and of x. share: 1 / (H * W).
template <class T, class Tile, int kStages, int kVector>
__global__ void __launch_bounds__(Tile::kThreads, kDepthwiseBlocks)
    depthwise_conv_gelu_kernel(DepthwiseProblem<T> p, float* __restrict__ partial, float share) {
  extern __shared__ __align__(16) unsigned char memory[];
  const DepthwisePart part = depthwise_part<Tile>(p, blockIdx.x);
  const int channel = part.channel + threadIdx.x % Tile::kChannels, group = threadIdx.x / Tile::kChannels;
  const int column = part.column + group * kOutputs;
  const int columns = channel < p.channels ? p.width - column : 0;
  T* y = p.y + ((static_cast<int64_t>(part.picture) * p.height + part.row) * p.width + column) * p.channels + channel;
  float y_sum = 0, x_sum = 0;
  depthwise_march<T, Tile, kStages, kVector>(
      p, part, memory,
      [&](int row, const float* values) {
        if (row < 0 || row >= part.rows) return;
#pragma unroll
        for (int j = 0; j < kOutputs; ++j) {
          if (j < columns) x_sum += values[kHalo + j];
        }
      },
      [&](int, const float* sums) {
#pragma unroll
        for (int j = 0; j < kOutputs; ++j) {
          if (j >= columns) continue;
          const float value = gelu(sums[j]);
          y_sum += value;
          from_float(value, y[static_cast<int64_t>(j) * p.channels]);
        }
        y += static_cast<int64_t>(p.width) * p.channels;
      });
  if (channel >= p.channels) return;
  const int64_t tile = (static_cast<int64_t>(part.picture) * p.strips + part.strip) * p.column_tiles + part.column_tile;
  float* mine = partial + (tile * Tile::kGroups + group) * 2 * p.channels + channel;
  mine[0] = share * y_sum;
  mine[p.channels] = share * x_sum;
}

}  // namespace mra::cuda
