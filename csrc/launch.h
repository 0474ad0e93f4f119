// Host signatures of all native kernels, one structure of arguments for each direction of an op.
//
// Nothing here knows torch: a launch takes pointers, sizes and a place to run. Tensors are contiguous; `void*` tensors
// hold elements of `dtype`, `float*` tensors are always float32. A null gradient pointer means: do not compute it.
#pragma once

#include <cstdint>

namespace mra {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct DepthwiseConvNormForward {
  const void* x;            // [B, H, W, C]
  const void* weight;       // [C, 1, 7, 7]
  const void* bias;         // [C]
  const void* norm_weight;  // [C]
  const void* norm_bias;    // [C]
  void* y;                  // [B, H, W, C]
  float* mean;              // [B, H, W], of the convolution's output over the channels
  float* rstd;              // [B, H, W]
  int64_t batch, height, width, channels;
  float eps;
  DType dtype;
  int threads;
};

struct DepthwiseConvNormBackward {
  const void* grad_y;       // [B, H, W, C]
  const void* x;            // [B, H, W, C]
  const void* weight;       // [C, 1, 7, 7]
  const void* bias;         // [C]
  const void* norm_weight;  // [C]
  const float* mean;        // [B, H, W]
  const float* rstd;        // [B, H, W]
  void* grad_x;             // [B, H, W, C]
  void* grad_weight;        // [C, 1, 7, 7]
  void* grad_bias;          // [C]
  void* grad_norm_weight;   // [C]
  void* grad_norm_bias;     // [C]
  int64_t batch, height, width, channels;
  DType dtype;
  int threads;
};

struct LinearScaleResidualForward {
  void* y;               // [rows, N], the product x W^T + b; becomes residual + scale * y
  const void* scale;     // [N], or null for 1
  const void* residual;  // [rows, N]
  int64_t rows, channels;
  DType dtype;
  int threads;
};

struct GatedResampleAddForward {
  const void* low;    // [B, H, W, C]
  const void* high;   // [B, H', W', C]
  const float* gate;  // [B]
  void* y;            // [B, H, W, C]
  int64_t batch, height, width, channels, high_height, high_width;
  DType dtype;
  int threads;   // CPU only
  void* stream;  // CUDA only: a cudaStream_t
};

struct GatedResampleAddBackward {
  const void* grad_y;  // [B, H, W, C]
  const void* high;    // [B, H', W', C]
  const float* gate;   // [B]
  void* grad_high;     // [B, H', W', C]
  float* grad_gate;    // [B]
  float* partial;      // [B, H], scratch for the gate's gradient; null with it
  int64_t batch, height, width, channels, high_height, high_width;
  DType dtype;
  int threads;   // CPU only
  void* stream;  // CUDA only: a cudaStream_t
};

namespace cpu {
// The instruction set that the kernels below run with: "avx512", "avx2" or "baseline".
const char* instruction_set();
// Runs them with another one, for tests. Throws std::invalid_argument where the processor does not have it.
void select_instruction_set(const char* name);

void depthwise_conv_norm_forward(const DepthwiseConvNormForward&);
void depthwise_conv_norm_backward(const DepthwiseConvNormBackward&);
void linear_scale_residual_forward(const LinearScaleResidualForward&);
void gated_resample_add_forward(const GatedResampleAddForward&);
void gated_resample_add_backward(const GatedResampleAddBackward&);
}  // namespace cpu

namespace cuda {
// On `device`, on the stream of the arguments. Throws std::runtime_error with CUDA's own message.
void gated_resample_add_forward(const GatedResampleAddForward&, int device);
void gated_resample_add_backward(const GatedResampleAddBackward&, int device);
}  // namespace cuda

}  // namespace mra
