// Depthwise 7x7 convolution on the GPU, channels last: what the ops around it call.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace mra::cuda {

struct DepthwiseConv7 {
  const void* x;          // [B, H, W, C]
  const void* weight;     // [C, 1, 7, 7]
  const void* bias;       // [C], or null
  const float* constant;  // [B, C], added everywhere; or null
  void* y;                // [B, H, W, C]
  int64_t batch, height, width, channels;
  bool flipped;  // taps turned by 180 degrees: the gradient of the input from that of the output
  DType dtype;
  cudaStream_t stream;  // of the current device
};

// y = bias + constant + convolution of x, with zeros around each picture. Throws std::runtime_error.
void depthwise_conv7(const DepthwiseConv7&);

}  // namespace mra::cuda
