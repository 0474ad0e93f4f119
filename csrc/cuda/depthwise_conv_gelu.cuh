// Depthwise 7x7 convolution, bias and GELU, with the sums over the picture of the output and of the input on the way: a
// thread keeps those of its channels over its strips, and a second stage adds them in order.
#pragma once

#include "common/gelu.cuh"
#include "cuda/depthwise_conv7_mma.cuh"

namespace mra::cuda {

// partial: [B, parts, 2, C], the shares of the means of y and of x, a part for each strip, column tile and group of
// columns. share: 1 / (H * W).
template <class T, class Tile, int kStages, int kVector>
__global__ void __launch_bounds__(Tile::kThreads, kDepthwiseBlocks)
    depthwise_conv_gelu_kernel(DepthwiseProblem<T> p, float* __restrict__ partial, float share) {
  extern __shared__ __align__(16) unsigned char memory[];
  const DepthwisePart part = depthwise_part<Tile>(p);
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
          const float value = gelu<T>(sums[j]);
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

// The sum of every 32nd of a channel's inputs where a block's outputs are, from the lane's first one on.
template <class T, class Tile>
__device__ __forceinline__ float depthwise_lane_sum(const DepthwiseProblem<T>& p, const DepthwisePart& part,
                                                    int channel) {
  float sum = 0;
  const int last = min(p.height, part.row + Tile::kStrips * p.rows);
  for (int y = part.row; y < last; ++y) {
    const T* const row = p.x + (static_cast<int64_t>(part.picture) * p.height + y) * p.width * p.channels + channel;
    for (int x = part.column + threadIdx.x % 32; x < min(p.width, part.column + Tile::kColumns); x += 32) {
      sum += to_float(row[static_cast<int64_t>(x) * p.channels]);
    }
  }
  return sum;
}

// Convolution, GELU and sums on tensor cores; a part for each strip and column tile. The sums of x are a product, too:
// an input row, with zeros outside the map, times a matrix of zeros but for a column of ones at the 8 inner inputs; the
// columns are 0 and 1 for the warp's two channels.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kMmaBlocks)
    depthwise_conv_gelu_mma_kernel(DepthwiseProblem<T> p, float* __restrict__ partial, float share) {
  extern __shared__ __align__(16) unsigned char memory[];
  DepthwisePart part = depthwise_part<Tile>(p);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  T one;
  from_float(1.0f, one);
  const auto inner = [&](int k) -> uint32_t {
    return k >= kHalo && k < kHalo + 8 ? reinterpret_cast<uint16_t&>(one) : 0;
  };
  const uint32_t ones = pinned(inner(2 * t) | inner(2 * t + 1) << 16);
  // Of the map, from the first of the thread's two outputs of tiles g and g + 8 on, and from the block's first row on.
  int columns[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) columns[i] = p.width - part.column - 8 * Tile::tile(g + 8 * i) - 2 * t;
  const int rows = p.height - part.row;
  float y_sums[2] = {}, x_sums[4] = {};
  depthwise_mma_march<T, Tile>(
      p, part, memory,
      [&](int row, int c, const uint32_t (&inputs)[4]) {
        if (row >= 0 && row < p.rows)
          mma<T>(x_sums, inputs, g == c ? uint2{ones, ones ^ inner(4) * 0x10001} : uint2{0, 0});
      },
      [&](int row, int c, float (&sums)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[j] = gelu<T>(sums[j]);
          if (j % 2 < columns[j / 2] && row + Tile::strip(g + j / 2 * 8) * p.rows < rows) y_sums[c] += sums[j];
        }
      });
  part = depthwise_part_again<Tile>(p);
  // Where x is not finite, y of the same pixel is not, either.
  const bool broken = __syncthreads_or(!isfinite(y_sums[0] + y_sums[1]));
  if (broken) depthwise_mma_repair<T, Tile>(p, part, [](float sum) { return gelu<T>(sum); });
  const int64_t tile = (static_cast<int64_t>(part.picture) * p.strips + part.strip) * p.column_tiles + part.column_tile;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int channel = part.channel + threadIdx.x / 32 * 2 + c;
    float totals[2] = {y_sums[c], t == 0 ? x_sums[c] + x_sums[c + 2] : 0.0f};
    // The product has mixed both channels.
    if (broken && channel < p.channels) totals[1] = depthwise_lane_sum<T, Tile>(p, part, channel);
#pragma unroll
    for (float& total : totals) {
#pragma unroll
      for (int step = 16; step > 0; step >>= 1) total += __shfl_xor_sync(0xffffffffu, total, step);
    }
    if (lane > 0 || channel >= p.channels) continue;
    float* mine = partial + tile * 2 * p.channels + channel;
    mine[0] = share * totals[0];
    mine[p.channels] = share * totals[1];
  }
}

}  // namespace mra::cuda
