// What backward of depthwise_conv_gelu does between its convolutions: through the GELU, and the gradients of the means.
//
// Work: a thread owns 16 bytes of channels of one pixel (one element where an address or C does not allow that); the
// blocks of a grid row share one row of the map. Bytes: 3 * C elements a pixel: bound by memory.
#pragma once

#include "common/elements.cuh"
#include "common/gelu.cuh"
#include "launch.h"

namespace mra::cuda {

constexpr int kGeluThreads = 256;

// grad_conv: [B, H, W, C] holds the convolution's output and gets its gradient, (grad_y + share * grad_y_mean) times
// the slope; grad_y: the same, grad_y_mean: [B, C]; null for zeros. Grid: x covers a row's W * C / kCount vectors, y
// strides over the B * H rows.
template <class T, int kCount>
__global__ void __launch_bounds__(kGeluThreads)
    gelu_gradient_kernel(const T* __restrict__ grad_y, const float* __restrict__ grad_y_mean, T* __restrict__ grad_conv,
                         float share, int rows, int height, int width, int vectors) {
  const int i = blockIdx.x * kGeluThreads + threadIdx.x;
  if (i >= width * vectors) return;
  const int channels = vectors * kCount, c = i % vectors * kCount;
  for (int row = blockIdx.y; row < rows; row += gridDim.y) {
    const int64_t offset = static_cast<int64_t>(row) * width * channels + static_cast<int64_t>(i) * kCount;
    const Floats<kCount> conv = load<kCount>(grad_conv + offset);
    Floats<kCount> grad = {};
    if (grad_y != nullptr) grad = load<kCount>(grad_y + offset);
    if (grad_y_mean != nullptr) {
      const float* mean = grad_y_mean + static_cast<int64_t>(row / height) * channels + c;
#pragma unroll
      for (int k = 0; k < kCount; ++k) grad.values[k] = fmaf(share, mean[k], grad.values[k]);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) grad.values[k] *= gelu_slope(conv.values[k]);
    store<kCount>(grad_conv + offset, grad);
  }
}

// constant = share * grad_x_mean: [count], what the mean's gradient adds to each of the input's.
__global__ void __launch_bounds__(kGeluThreads)
    mean_gradient_kernel(const float* __restrict__ grad_x_mean, float* __restrict__ constant, float share,
                         int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kGeluThreads + threadIdx.x;
  if (i < count) constant[i] = share * grad_x_mean[i];
}

}  // namespace mra::cuda
