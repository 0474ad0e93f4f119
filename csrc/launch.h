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
  void* grad_conv;          // GPU only: scratch [B, H, W, C], the gradient of the convolution's output
  float* partial;           // GPU only: scratch of depthwise_conv_norm_partials floats
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
  float* partial;      // GPU only: scratch of depthwise_conv_gelu_sums floats
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
  void* grad_conv;           // GPU only: scratch [B, H, W, C], the gradient of the convolution's output
  float* partial;            // GPU only: scratch of depthwise_conv_gelu_partials floats
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
  float* partial;           // CUDA: scratch of layer_norm_partials(rows, C) floats
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
  float* partial;           // CUDA: scratch of layer_norm_partials(B * H * W, C) floats
  int64_t batch, height, width, channels;
  DType dtype;
  Place place;
};

// What follows the product; the product itself is the library's.
struct LinearGeluForward {
  const void* product;        // [B, L, N], x W^T + b; on a CPU null where y holds the activation already
  void* y;                    // [B, L, N], GELU(product); may be the product's memory
  const float* mean_weights;  // [L], or null
  float* y_mean;              // [B, N], sum_l mean_weights[l] y[b, l]; null with mean_weights
  float* partial;             // CUDA: scratch of linear_gelu_partials(B, L, N) floats; null with mean_weights
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
  float* partial;             // CUDA: scratch of linear_gelu_partials(B, L, N) floats; (1, B * L, N) without a mean
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
  float* partial;       // CUDA: scratch of linear_scale_residual_partials(rows, N) floats
  int64_t rows, channels;
  DType dtype;
  Place place;
};

// Heads lie side by side in a row of query, key and value, whose rows are a stride apart, from picture to picture too.
struct AttentionForward {
  const void* query;  // [B, L, H, D]
  const void* key;    // [B, M, H, D]
  const void* value;  // [B, M, H, D]
  void* y;            // [B, L, H, D]
  float* logsumexp;   // [B, H, L], of the scaled scores over the keys
  int64_t batch, queries, keys, heads, channels, query_stride, key_stride, value_stride;
  float scale;
  DType dtype;
  Place place;
};

struct AttentionBackward {
  const void* grad_y;      // [B, L, H, D]
  const void* query;       // [B, L, H, D]
  const void* key;         // [B, M, H, D]
  const void* value;       // [B, M, H, D]
  const void* y;           // [B, L, H, D]
  const float* logsumexp;  // [B, H, L]
  void* grad_query;        // [B, L, H, D]
  void* grad_key;          // [B, M, H, D]
  void* grad_value;        // [B, M, H, D]
  int64_t batch, queries, keys, heads, channels, query_stride, key_stride, value_stride;
  float scale;
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
  X(context, attention_forward, AttentionForward)                         \
  X(context, attention_backward, AttentionBackward)                       \
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
void depthwise_conv_gelu_forward(const DepthwiseConvGeluForward&);
void depthwise_conv_gelu_backward(const DepthwiseConvGeluBackward&);
void depthwise_conv_norm_forward(const DepthwiseConvNormForward&);
void depthwise_conv_norm_backward(const DepthwiseConvNormBackward&);
void gated_resample_add_forward(const GatedResampleAddForward&);
void gated_resample_add_backward(const GatedResampleAddBackward&);
void linear_gelu_forward(const LinearGeluForward&);
void linear_gelu_backward(const LinearGeluBackward&);
void linear_scale_residual_forward(const LinearScaleResidualForward&);
void linear_scale_residual_backward(const LinearScaleResidualBackward&);
void norm_patchify_forward(const NormPatchifyForward&);
void norm_patchify_backward(const NormPatchifyBackward&);
void patch_conv_norm_forward(const PatchConvNormForward&);
void patch_conv_norm_backward(const PatchConvNormBackward&);

// How many floats of scratch sums over rows take: the same for every device, so that they are the same sums.
int64_t depthwise_conv_gelu_sums(int64_t batch, int64_t height, int64_t width, int64_t channels);
int64_t depthwise_conv_gelu_partials(int64_t batch, int64_t channels);
int64_t depthwise_conv_norm_partials(int64_t batch, int64_t height, int64_t width, int64_t channels);
int64_t layer_norm_partials(int64_t rows, int64_t channels);
int64_t linear_gelu_partials(int64_t groups, int64_t rows, int64_t channels);
int64_t linear_scale_residual_partials(int64_t rows, int64_t channels);
}  // namespace cuda

}  // namespace mra
