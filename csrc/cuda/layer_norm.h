// LayerNorm over rows of C channels, for the host functions of ops that contain one.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace mra::cuda {

// y = (x - mean) * rstd * weight + bias over the channels.
struct LayerNormRows {
  const void* x;       // [rows, C]
  const void* weight;  // [C]
  const void* bias;    // [C]
  void* y;             // [rows, C]; may be x's memory
  float* mean;         // [rows], or null
  float* rstd;         // [rows], or null
  int64_t rows, channels;
  float eps;
  DType dtype;
  cudaStream_t stream;  // of the current device
};

void layer_norm_rows(const LayerNormRows&);

// Its gradients. Those that are null are not computed.
struct LayerNormRowsBackward {
  const void* grad_y;  // [rows, C]
  const void* x;       // [rows, C]
  const void* weight;  // [C]
  const float* mean;   // [rows]; with rstd null, both are computed again
  const float* rstd;   // [rows]
  void* grad_x;        // [rows, C]; may be grad_y's memory or x's
  void* grad_weight;   // [C]
  void* grad_bias;     // [C]
  void* grad_x_sum;    // [C], the sum of grad_x over the rows: the gradient of a bias in front of the norm
  float* partial;      // scratch of layer_norm_partials(rows, C) floats; null where no [C] gradient is wanted
  int64_t rows, channels;
  float eps;
  DType dtype;
  cudaStream_t stream;  // of the current device
};

void layer_norm_rows_backward(const LayerNormRowsBackward&);

}  // namespace mra::cuda
