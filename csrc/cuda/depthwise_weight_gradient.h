// Gradients of a depthwise 7x7 convolution's taps and bias, on the GPU.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace mra::cuda {

struct DepthwiseWeightGradient {
  const void* grad;   // [B, H, W, C], of the convolution's output
  const void* x;      // [B, H, W, C], the convolution's input
  void* grad_weight;  // [C, 1, 7, 7], or null
  void* grad_bias;    // [C], or null
  float* partial;     // scratch of depthwise_weight_gradient_partials(channels) floats
  int64_t batch, height, width, channels;
  DType dtype;
  cudaStream_t stream;  // of the current device
};

int64_t depthwise_weight_gradient_partials(int64_t channels);

void depthwise_weight_gradient(const DepthwiseWeightGradient&);

}  // namespace mra::cuda
