// LayerNorm over the channels, written as rows of 2x2 patches, forward and backward, channels last.
//
// The kernels are LayerNorm's: a pixel's place in its patch row is another address for the same C elements, so
// patchifying costs nothing beyond two divisions a row. Bytes and FLOPs are those of layer_norm.cuh.
#pragma once

#include <cstdint>

namespace mra::cuda {

// Pixel (b, y, x) of maps [B, H, W] -> row of the patches [B, H / 2, W / 2, 2, 2]. An odd map's last row and column
// belong to none.
struct PatchOrder {
  uint32_t height, width;

  __device__ __forceinline__ int64_t operator()(int64_t pixel) const {
    // 64-bit division is slow.
    return pixel <= UINT32_MAX ? place(static_cast<uint32_t>(pixel)) : place(static_cast<uint64_t>(pixel));
  }

  template <class Index>
  __device__ __forceinline__ int64_t place(Index pixel) const {
    const Index row = pixel / width, b = row / height;
    const auto x = static_cast<uint32_t>(pixel - row * width), y = static_cast<uint32_t>(row - b * height);
    if (y / 2 >= height / 2 || x / 2 >= width / 2) return -1;
    const int64_t patch = (static_cast<int64_t>(b) * (height / 2) + y / 2) * (width / 2) + x / 2;
    return patch * 4 + y % 2 * 2 + x % 2;
  }
};

}  // namespace mra::cuda
