// Depthwise 7x7 convolution + bias + LayerNorm over the channels, forward and backward, channels last.
//
// Work: tiles of 8x8 pixels with all their channels. A tile's convolution stays in a buffer of 64 * C floats in the
// second-level cache, where two passes give mean and variance and a third writes the output: the map is read once
// (its halo from cache) and written once. 98 FLOPs and 4 bytes (bfloat16) an element: bound by the multiply-adds.
//
// Backward recomputes the convolution instead of keeping it. One pass turns grad_y into the convolution's gradient
// and sums the vectors' gradients; a second convolves it with the flipped taps; a third correlates it with x.
// Sums go first over a task's tiles, then over tasks in their order, so they do not depend on the threads.
#include "cpu/depthwise_conv7.h"

namespace mra::cpu::MRA_ISA {
namespace {

constexpr int64_t kTasks = 32;

struct Statistics {
  float mean, rstd;
};

// values: [padded], zero in the padding. Two passes.
inline Statistics statistics(const float* values, int64_t channels, int64_t padded, float eps) {
  Floats total = {};
  for (int64_t c = 0; c < padded; c += kLanes) total += load(values + c);
  const float mean = sum(total) / channels;
  Floats squares = {};
  for (int64_t c = 0; c < channels; c += kLanes) {
    Floats d = load(values + c) - mean;
    if (c + kLanes > channels) {
      for (int64_t i = channels - c; i < kLanes; ++i) d[i] = 0;
    }
    squares += d * d;
  }
  return {mean, 1.0f / __builtin_sqrtf(sum(squares) / channels + eps)};
}

// What both directions need to compute the convolution, widened and padded once a call.
template <class T>
struct Convolution {
  float *taps, *bias;

  Convolution(const void* weight, const void* bias_vector, int64_t channels)
      : taps(thread_buffer<struct Taps>(kTaps * kTaps * round_up(channels, kLanes))),
        bias(thread_buffer<struct Bias>(round_up(channels, kLanes))) {
    pack_taps(static_cast<const T*>(weight), taps, channels, false);
    pack_vector(static_cast<const T*>(bias_vector), bias, channels);
  }

  // The tile's outputs, before the norm: [64, padded], in a buffer of the calling thread.
  float* run(const Map<const T>& x, const Tile& tile) const {
    const int64_t padded = x.padded();
    float* out = thread_buffer<struct Outputs>(kTile * kTile * padded);
    alignas(64) Floats patch[kPatch * kPatch];
    for (int64_t c = 0; c < x.channels; c += kLanes) {
      load_patch<kPatch>(x, tile.b, tile.y - kPad, tile.x - kPad, c, patch);
      conv_patch(patch, taps + kTaps * kTaps * c, load(bias + c), tile,
                 [&](int row, int column, Floats v) { store(out + (row * kTile + column) * padded + c, v); });
    }
    return out;
  }
};

template <class T>
void forward(const DepthwiseConvNormForward& a) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  const int64_t channels = a.channels, padded = x.padded(), tasks = smaller(kTasks, x.tiles());
  const Convolution<T> convolution(a.weight, a.bias, channels);
  float *scale = thread_buffer<struct Scale>(padded), *shift = thread_buffer<struct Shift>(padded);
  pack_vector(static_cast<const T*>(a.norm_weight), scale, channels);
  pack_vector(static_cast<const T*>(a.norm_bias), shift, channels);
  for_each_tile(x, tasks, a.threads, [&](int64_t, const Tile& tile) {
    const float* conv = convolution.run(x, tile);
    for (int64_t i = 0; i < tile.rows * kTile; ++i) {
      if (i % kTile >= tile.columns) continue;
      const float* values = conv + i * padded;
      const Statistics s = statistics(values, channels, padded, a.eps);
      const int64_t pixel = (tile.b * a.height + tile.y + i / kTile) * a.width + tile.x + i % kTile;
      T* y = static_cast<T*>(a.y) + pixel * channels;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const Floats normal = (load(values + c) - s.mean) * s.rstd;
        store_first(y + c, normal * load(scale + c) + load(shift + c), channels - c);
      }
      a.mean[pixel] = s.mean;
      a.rstd[pixel] = s.rstd;
    }
  });
}

// Sums of one task: gradients of bias, norm weight and norm bias, [3, padded].
struct Sums {
  float *bias, *norm_weight, *norm_bias;
};

// LayerNorm backward of one pixel. conv: the convolution's output, [padded]; writes its gradient, [C].
template <class T>
inline void norm_backward(const T* grad_y, const float* conv, const float* scale, float mean, float rstd,
                          int64_t channels, const Sums& sums, T* grad_conv) {
  Floats total = {}, projected = {};
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Floats g = load_first(grad_y + c, channels - c);
    const Floats normal = (load(conv + c) - mean) * rstd;
    store(sums.norm_weight + c, load(sums.norm_weight + c) + g * normal);
    store(sums.norm_bias + c, load(sums.norm_bias + c) + g);
    total += g * load(scale + c);
    projected += g * load(scale + c) * normal;
  }
  const float average = sum(total) / channels, slope = sum(projected) / channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Floats g = load_first(grad_y + c, channels - c) * load(scale + c);
    const Floats normal = (load(conv + c) - mean) * rstd;
    const Floats d = (g - average - normal * slope) * rstd;
    store(sums.bias + c, load(sums.bias + c) + d);
    store_first(grad_conv + c, d, channels - c);
  }
}

// grad_conv: [B, H, W, C], the gradient of the convolution's output; partial: [tasks, 3, padded].
template <class T>
void conv_output_gradient(const DepthwiseConvNormBackward& a, int64_t tasks, T* grad_conv, float* partial) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  const int64_t padded = x.padded();
  const Convolution<T> convolution(a.weight, a.bias, a.channels);
  float* scale = thread_buffer<struct Scale>(padded);
  pack_vector(static_cast<const T*>(a.norm_weight), scale, a.channels);
  std::memset(partial, 0, tasks * 3 * padded * sizeof(float));
  for_each_tile(x, tasks, a.threads, [&](int64_t task, const Tile& tile) {
    const float* conv = convolution.run(x, tile);
    float* mine = partial + task * 3 * padded;
    const Sums sums{mine, mine + padded, mine + 2 * padded};
    for (int64_t i = 0; i < tile.rows * kTile; ++i) {
      if (i % kTile >= tile.columns) continue;
      const int64_t pixel = (tile.b * a.height + tile.y + i / kTile) * a.width + tile.x + i % kTile;
      norm_backward(static_cast<const T*>(a.grad_y) + pixel * a.channels, conv + i * padded, scale, a.mean[pixel],
                    a.rstd[pixel], a.channels, sums, grad_conv + pixel * a.channels);
    }
  });
}

// grad_x = grad_conv convolved with the flipped taps.
template <class T>
void input_gradient(const DepthwiseConvNormBackward& a, const T* grad_conv) {
  const Map<const T> grad{grad_conv, a.batch, a.height, a.width, a.channels};
  const Map<T> out{static_cast<T*>(a.grad_x), a.batch, a.height, a.width, a.channels};
  Scratch<float> taps(kTaps * kTaps * grad.padded());
  pack_taps(static_cast<const T*>(a.weight), taps.get(), a.channels, true);
  for_each_tile(grad, smaller(kTasks, grad.tiles()), a.threads, [&](int64_t, const Tile& tile) {
    alignas(64) Floats patch[kPatch * kPatch];
    for (int64_t c = 0; c < a.channels; c += kLanes) {
      load_patch<kPatch>(grad, tile.b, tile.y - kPad, tile.x - kPad, c, patch);
      conv_patch(patch, taps.get() + kTaps * kTaps * c, Floats{}, tile, [&](int row, int column, Floats v) {
        store_first(out.pixel(tile.b, tile.y + row, tile.x + column) + c, v, a.channels - c);
      });
    }
  });
}

// Adds up `count` blocks of `size` floats, `stride` apart, in their order, into `total`.
void add_in_order(const float* blocks, int64_t count, int64_t stride, int64_t size, float* total) {
  for (int64_t i = 0; i < size; i += kLanes) {
    Floats s = {};
    for (int64_t k = 0; k < count; ++k) s += load(blocks + k * stride + i);
    store(total + i, s);
  }
}

template <class T>
void weight_gradient(const DepthwiseConvNormBackward& a, const T* grad_conv) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  const Map<const T> grad{grad_conv, a.batch, a.height, a.width, a.channels};
  const int64_t size = kTaps * kTaps * x.padded(), tasks = smaller(kTasks, x.tiles());
  Scratch<float> partial(tasks * size), total(size);
  std::memset(partial.get(), 0, tasks * size * sizeof(float));
  for_each_tile(x, tasks, a.threads, [&](int64_t task, const Tile& tile) {
    alignas(64) Floats patch[kPatch * kPatch], tile_grad[kTile * kTile];
    for (int64_t c = 0; c < a.channels; c += kLanes) {
      load_patch<kPatch>(x, tile.b, tile.y - kPad, tile.x - kPad, c, patch);
      load_patch<kTile>(grad, tile.b, tile.y, tile.x, c, tile_grad);
      correlate_patch(patch, tile_grad, partial.get() + task * size + kTaps * kTaps * c);
    }
  });
  add_in_order(partial.get(), tasks, size, size, total.get());
  T* out = static_cast<T*>(a.grad_weight);
  for (int64_t c = 0; c < a.channels; ++c) {
    for (int t = 0; t < kTaps * kTaps; ++t) {
      const float sum_of_tap = total.get()[(c / kLanes * kTaps * kTaps + t) * kLanes + c % kLanes];
      store_first(out + c * kTaps * kTaps + t, broadcast(sum_of_tap), 1);
    }
  }
}

template <class T>
void vector_gradient(void* out, const float* partial, int64_t tasks, int64_t channels, int64_t padded) {
  if (out == nullptr) return;
  Scratch<float> total(padded);
  add_in_order(partial, tasks, 3 * padded, padded, total.get());
  for (int64_t c = 0; c < channels; c += kLanes) {
    store_first(static_cast<T*>(out) + c, load(total.get() + c), channels - c);
  }
}

template <class T>
void backward(const DepthwiseConvNormBackward& a) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  const int64_t padded = x.padded(), tasks = smaller(kTasks, x.tiles());
  Scratch<T> grad_conv(a.batch * a.height * a.width * a.channels);
  Scratch<float> partial(tasks * 3 * padded);
  conv_output_gradient(a, tasks, grad_conv.get(), partial.get());
  vector_gradient<T>(a.grad_bias, partial.get(), tasks, a.channels, padded);
  vector_gradient<T>(a.grad_norm_weight, partial.get() + padded, tasks, a.channels, padded);
  vector_gradient<T>(a.grad_norm_bias, partial.get() + 2 * padded, tasks, a.channels, padded);
  if (a.grad_x != nullptr) input_gradient(a, grad_conv.get());
  if (a.grad_weight != nullptr) weight_gradient(a, grad_conv.get());
}

}  // namespace

void depthwise_conv_norm_forward(const DepthwiseConvNormForward& a) {
  with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

void depthwise_conv_norm_backward(const DepthwiseConvNormBackward& a) {
  with_type(a.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
