// Host signatures of all native kernels, one structure of arguments for each direction of an op.
//
// Nothing here knows torch: a launch takes pointers, sizes and a place to run. Tensors are contiguous; `void*` tensors
// hold elements of `dtype`, `float*` tensors are always float32. A null gradient pointer means: do not compute it.
#pragma once

#include <cstdint>

namespace mra {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Where a kernel runs.
struct Place {
  int device;    // of CUDA; -1 for the CPU
  void* stream;  // CUDA only: a cudaStream_t
  int threads;   // CPU only
};

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
  Place place;
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
  Place place;
};

struct DepthwiseConvGeluForward {
  const void* x;       // [B, H, W, C]
  const void* weight;  // [C, 1, 7, 7]
  const void* bias;    // [C]
  void* y;             // [B, H, W, C]
  float* y_mean;       // [B, C], over the picture
  float* x_mean;       // [B, C]
  int64_t batch, height, width, channels;
  DType dtype;
  Place place;
};

struct DepthwiseConvGeluBackward {
  const void* grad_y;        // [B, H, W, C], or null for zeros
  const float* grad_y_mean;  // [B, C], or null for zeros
  const float* grad_x_mean;  // [B, C], or null for zeros
  const void* x;             // [B, H, W, C]
  const void* weight;        // [C, 1, 7, 7]
  const void* bias;          // [C]
  void* grad_x;              // [B, H, W, C]
  void* grad_weight;         // [C, 1, 7, 7]
  void* grad_bias;           // [C]
  int64_t batch, height, width, channels;
  DType dtype;
  Place place;
};

struct PatchConvNormForward {
  const void* pixels;       // [B, P, S1, S2]
  const void* weight;       // [C, P, k, k]
  const void* bias;         // [C]
  const void* norm_weight;  // [C]
  const void* norm_bias;    // [C]
  void* y;                  // [B, S1 / k, S2 / k, C]
  float* mean;              // [B, S1 / k, S2 / k], of the convolution's output over the channels
  float* rstd;              // [B, S1 / k, S2 / k]
  int64_t batch, planes, height, width, channels, patch;
  float eps;
  DType dtype;
  Place place;
};

// The norm's part; the convolution's gradients are matrix products.
struct PatchConvNormBackward {
  const void* grad_y;       // [rows, C]
  const void* conv;         // [rows, C], the convolution's output
  const void* norm_weight;  // [C]
  void* grad_conv;          // [rows, C]
  void* grad_bias;          // [C]
  void* grad_norm_weight;   // [C]
  void* grad_norm_bias;     // [C]
  int64_t rows, channels;
  float eps;
  DType dtype;
  Place place;
};

struct NormPatchifyForward {
  const void* x;            // [B, H, W, C]
  const void* norm_weight;  // [C]
  const void* norm_bias;    // [C]
  void* y;                  // [B, H / 2, W / 2, 4 * C], a row ordered (dy, dx, c)
  float* mean;              // [B, H, W]
  float* rstd;              // [B, H, W]
  int64_t batch, height, width, channels;
  float eps;
  DType dtype;
  Place place;
};

struct NormPatchifyBackward {
  const void* grad_y;       // [B, H / 2, W / 2, 4 * C]
  const void* x;            // [B, H, W, C]
  const void* norm_weight;  // [C]
  const float* mean;        // [B, H, W]
  const float* rstd;        // [B, H, W]
  void* grad_x;             // [B, H, W, C]; the last row and column of an odd map are zero
  void* grad_norm_weight;   // [C]
  void* grad_norm_bias;     // [C]
  int64_t batch, height, width, channels;
  DType dtype;
  Place place;
};

// What follows the product; the product itself is the library's.
struct LinearGeluForward {
  const void* product;        // [B, L, N], x W^T + b; or null where y holds the activation already
  void* y;                    // [B, L, N], GELU(product)
  const float* mean_weights;  // [L], or null
  float* y_mean;              // [B, N], sum_l mean_weights[l] y[b, l]; null with mean_weights
  int64_t batch, positions, channels;
  DType dtype;
  Place place;
};

// What precedes the products.
struct LinearGeluBackward {
  const void* grad_y;         // [B, L, N], or null for zeros
  const float* grad_y_mean;   // [B, N], or null for zeros
  const void* product;        // [B, L, N]
  const float* mean_weights;  // [L], or null
  void* grad_product;         // [B, L, N]
  void* grad_bias;            // [N]
  int64_t batch, positions, channels;
  DType dtype;
  Place place;
};

// What follows the product; the product itself is the library's.
struct LinearScaleResidualForward {
  const void* product;   // [rows, N], x W^T + b
  const void* scale;     // [N]
  const void* residual;  // [rows, N]
  void* y;               // [rows, N]; may be the product's memory
  int64_t rows, channels;
  DType dtype;
  Place place;
};

// What precedes the products.
struct LinearScaleResidualBackward {
  const void* grad_y;   // [rows, N]
  const void* scale;    // [N]
  const void* product;  // [rows, N]; null with grad_scale
  void* grad_product;   // [rows, N]
  void* grad_bias;      // [N]
  void* grad_scale;     // [N]
  int64_t rows, channels;
  DType dtype;
  Place place;
};

struct GatedResampleAddForward {
  const void* low;    // [B, H, W, C]
  const void* high;   // [B, H', W', C]
  const float* gate;  // [B]
  void* y;            // [B, H, W, C]
  int64_t batch, height, width, channels, high_height, high_width;
  DType dtype;
  Place place;
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
  Place place;
};

// Every CPU kernel: X(context, name, arguments).
#define MRA_CPU_KERNELS(X, context)                                       \
  X(context, depthwise_conv_gelu_forward, DepthwiseConvGeluForward)       \
  X(context, depthwise_conv_gelu_backward, DepthwiseConvGeluBackward)     \
  X(context, depthwise_conv_norm_forward, DepthwiseConvNormForward)       \
  X(context, depthwise_conv_norm_backward, DepthwiseConvNormBackward)     \
  X(context, gated_resample_add_forward, GatedResampleAddForward)         \
  X(context, gated_resample_add_backward, GatedResampleAddBackward)       \
  X(context, linear_gelu_forward, LinearGeluForward)                      \
  X(context, linear_gelu_backward, LinearGeluBackward)                    \
  X(context, linear_scale_residual_forward, LinearScaleResidualForward)   \
  X(context, linear_scale_residual_backward, LinearScaleResidualBackward) \
  X(context, norm_patchify_forward, NormPatchifyForward)                  \
  X(context, norm_patchify_backward, NormPatchifyBackward)                \
  X(context, patch_conv_norm_forward, PatchConvNormForward)               \
  X(context, patch_conv_norm_backward, PatchConvNormBackward)

namespace cpu {
// The instruction set that the kernels run with: "avx512_bf16", "avx512", "avx2" or "baseline".
const char* instruction_set();
// Runs them with another one, for tests. Throws std::invalid_argument where the processor does not have it.
void select_instruction_set(const char* name);

#define MRA_DECLARE(context, name, Arguments) void name(const Arguments&);
MRA_CPU_KERNELS(MRA_DECLARE, )
#undef MRA_DECLARE
}  // namespace cpu

namespace cuda {
// Throw std::runtime_error with CUDA's own message.
void gated_resample_add_forward(const GatedResampleAddForward&);
void gated_resample_add_backward(const GatedResampleAddBackward&);
}  // namespace cuda

}  // namespace mra
