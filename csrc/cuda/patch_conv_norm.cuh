// Convolution k x k with stride k + bias, from channels-first pixels to rows of channels; the LayerNorm that follows is
// layer_norm.cuh's, in place.
//
// Work: a block multiplies 64 patches with 64 channels, 32 steps of K = P k^2 at a time from shared memory; a thread
// has 8 patches x 2 channels in registers, 16 FMAs for 4 loads from shared memory. 1024 x 1024 pixels at batch 1, K =
// 48, C = 192, float32: 13 MB in, 50 MB out, 1.2 GFLOP: 15 us by memory, 20 by FMAs; and 100 MB more for the norm.
#pragma once

#include "common/elements.cuh"

namespace mra::cuda {

constexpr int kConvPatches = 64, kConvChannels = 64, kConvDepth = 32;
constexpr int kConvThreads = 256, kConvRows = 8;  // kConvRows: patches of a thread

// Patches of pixels [B, P, S1, S2], numbered along the grid [B, S1 / k, S2 / k].
template <class T>
struct PatchGrid {
  const T* pixels;
  int planes, height, width, patch;

  __device__ __forceinline__ int rows() const { return height / patch; }
  __device__ __forceinline__ int columns() const { return width / patch; }
  __device__ __forceinline__ int depth() const { return planes * patch * patch; }

  // Pixel (0, 0) of plane 0 of a patch. Division is slow in 64 bits.
  template <class Index>
  __device__ __forceinline__ const T* at(Index index) const {
    const Index row = index / columns(), b = row / rows();
    const Index y = (row - b * rows()) * patch, x = (index - row * columns()) * patch;
    return pixels + (static_cast<int64_t>(b) * planes * height + y) * width + x;
  }
  // Step k of a patch's K, in the order of a weight [C, P, k, k].
  __device__ __forceinline__ int64_t offset(int k) const {
    const int row = k / patch, plane = row / patch;
    return (static_cast<int64_t>(plane) * height + row - plane * patch) * width + k - row * patch;
  }
};

// weight: [C, K]. Grid: patch tiles x channel tiles, the latter innermost.
template <class T>
__global__ void __launch_bounds__(kConvThreads, 4)
    patch_conv_kernel(PatchGrid<T> grid, const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ y,
                      int64_t patches, int channels) {
  __shared__ float weights[kConvDepth][kConvChannels + 1];
  __shared__ __align__(16) float values[kConvDepth][kConvPatches];
  const int tiles = (channels + kConvChannels - 1) / kConvChannels, depth = grid.depth();
  const int64_t first_patch = static_cast<int64_t>(blockIdx.x / tiles) * kConvPatches;
  const int first_channel = static_cast<int>(blockIdx.x % tiles) * kConvChannels;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // The patch that this thread loads.
  const int column = threadIdx.x % kConvPatches;
  const bool exists = first_patch + column < patches;
  const T* const source = exists ? grid.at(first_patch + column) : nullptr;

  float sums[kConvRows][2] = {};
  for (int start = 0; start < depth; start += kConvDepth) {
    __syncthreads();
    for (int k = threadIdx.x / kConvPatches; k < kConvDepth; k += kConvThreads / kConvPatches) {
      const bool inside = exists && start + k < depth;
      values[k][column] = inside ? to_float(source[grid.offset(start + k)]) : 0.0f;
    }
    for (int c = warp; c < kConvChannels; c += kConvThreads / 32) {
      const bool inside = first_channel + c < channels && start + lane < depth;
      const int64_t row = static_cast<int64_t>(first_channel + c) * depth;
      weights[lane][c] = inside ? to_float(weight[row + start + lane]) : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kConvDepth; ++k) {
      const float w[2] = {weights[k][lane], weights[k][lane + 32]};
      const Floats<4> low = load<4>(&values[k][warp * kConvRows]), high = load<4>(&values[k][warp * kConvRows + 4]);
#pragma unroll
      for (int i = 0; i < kConvRows; ++i) {
        const float value = i < 4 ? low.values[i % 4] : high.values[i % 4];
        sums[i][0] = fmaf(value, w[0], sums[i][0]);
        sums[i][1] = fmaf(value, w[1], sums[i][1]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int c = first_channel + lane + half * 32;
    if (c >= channels) continue;
    const float shift = to_float(bias[c]);
#pragma unroll
    for (int i = 0; i < kConvRows; ++i) {
      const int64_t patch = first_patch + warp * kConvRows + i;
      if (patch < patches) from_float(sums[i][half] + shift, y[patch * channels + c]);
    }
  }
}

}  // namespace mra::cuda
