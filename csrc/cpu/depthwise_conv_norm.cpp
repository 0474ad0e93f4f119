// Depthwise 7x7 convolution + bias + LayerNorm over the channels, forward and backward, channels last.
//
// Work: tiles of 8x8 pixels with all their channels. A tile's convolution stays in a buffer of 64 * C floats in the
// second-level cache, where two passes give mean and variance and a third writes the output: the map is read once
// (its halo from cache) and written once. 98 FLOPs and 4 bytes (bfloat16) an element: bound by the multiply-adds.
//
// Backward recomputes the convolution instead of keeping it. One pass turns grad_y into the convolution's gradient
// and sums the vectors' gradients; a second convolves it with the flipped taps; a third correlates it with x.
#include "cpu/depthwise_conv7.h"
#include "cpu/depthwise_gradients.h"
#include "cpu/layer_norm.h"
#include "cpu/sums.h"

namespace mra::cpu::MRA_ISA {
namespace {

// Tasks of backward's first pass, each with sums of its own.
constexpr int64_t kTasks = 32;

// The tile's convolution before the norm: [64, padded], in a buffer of the calling thread.
template <class T>
inline float* convolve_tile(const Convolution<T>& convolution, const Map<const T>& x, const Tile& tile) {
  const int64_t padded = x.padded();
  float* out = thread_buffer<struct Outputs>(kTile * kTile * padded);
  convolution.run_tile(
      x, tile, [&](int64_t c, int row, int column, Floats v) { store(out + (row * kTile + column) * padded + c, v); });
  return out;
}

template <class T>
void forward(const DepthwiseConvNormForward& a) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  const int64_t channels = a.channels, padded = x.padded();
  const Convolution<T> convolution(a.weight, a.bias, channels, false, a.threads);
  float *scale = thread_buffer<struct Scale>(padded), *shift = thread_buffer<struct Shift>(padded);
  pack_vector(static_cast<const T*>(a.norm_weight), scale, channels);
  pack_vector(static_cast<const T*>(a.norm_bias), shift, channels);
  T* y = static_cast<T*>(a.y);
  const bool streams = worth_streaming(y, a.batch * a.height * a.width, channels);
  for_each_tile(x, row_tasks(x, a.threads), a.threads, [&](int64_t, const Tile& tile) {
    const float* conv = convolve_tile(convolution, x, tile);
    for (int64_t row = 0; row < tile.rows; ++row) {
      const float* values = conv + row * kTile * padded;
      const int64_t pixel = (tile.b * a.height + tile.y + row) * a.width + tile.x;
      Statistics s[kTile];
      row_statistics(values, tile.columns, padded, channels, a.eps, s);
      for (int64_t i = 0; i < tile.columns; ++i) {
        normalize(values + i * padded, s[i], scale, shift, channels, streams, y + (pixel + i) * channels);
        a.mean[pixel + i] = s[i].mean;
        a.rstd[pixel + i] = s[i].rstd;
      }
    }
    finish_streams();
  });
}

// grad_conv: [B, H, W, C], the gradient of the convolution's output; partial: [tasks, 3, padded], see NormSums.
template <class T>
void conv_output_gradient(const DepthwiseConvNormBackward& a, int64_t tasks, T* grad_conv, float* partial) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  const int64_t padded = x.padded();
  const Convolution<T> convolution(a.weight, a.bias, a.channels, false, a.threads);
  float* scale = thread_buffer<struct Scale>(padded);
  pack_vector(static_cast<const T*>(a.norm_weight), scale, a.channels);
  std::memset(partial, 0, tasks * NormSums::kRows * padded * sizeof(float));
  for_each_tile(x, tasks, a.threads, [&](int64_t task, const Tile& tile) {
    const float* conv = convolve_tile(convolution, x, tile);
    const NormSums sums = NormSums::at(partial + task * NormSums::kRows * padded, padded);
    for_each_pixel(tile, [&](int64_t row, int64_t column) {
      const int64_t pixel = (tile.b * a.height + tile.y + row) * a.width + tile.x + column;
      normalize_backward(static_cast<const T*>(a.grad_y) + pixel * a.channels, conv + (row * kTile + column) * padded,
                         Statistics{a.mean[pixel], a.rstd[pixel]}, scale, a.channels, sums,
                         grad_conv + pixel * a.channels);
    });
  });
}

template <class T>
void backward(const DepthwiseConvNormBackward& a) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  const int64_t padded = x.padded(), stride = NormSums::kRows * padded, tasks = smaller(kTasks, x.tiles());
  Scratch<T> grad_conv(a.batch * a.height * a.width * a.channels);
  Scratch<float> partial(tasks * stride);
  conv_output_gradient(a, tasks, grad_conv.get(), partial.get());
  const NormSums sums = NormSums::at(partial.get(), padded);
  sum_tasks(sums.weight, tasks, stride, a.channels, static_cast<T*>(a.grad_norm_weight));
  sum_tasks(sums.bias, tasks, stride, a.channels, static_cast<T*>(a.grad_norm_bias));
  sum_tasks(sums.input, tasks, stride, a.channels, static_cast<T*>(a.grad_bias));
  const Map<const T> grad{grad_conv.get(), a.batch, a.height, a.width, a.channels};
  if (a.grad_x != nullptr) input_gradient(grad, a.weight, nullptr, a.threads, static_cast<T*>(a.grad_x));
  if (a.grad_weight != nullptr) weight_gradient(x, grad, a.threads, static_cast<T*>(a.grad_weight));
}

}  // namespace

void depthwise_conv_norm_forward(const DepthwiseConvNormForward& a) {
  with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

void depthwise_conv_norm_backward(const DepthwiseConvNormBackward& a) {
  with_type(a.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
