// Depthwise 7x7 convolution + bias + GELU, with the means over the picture of output and input, forward and backward,
// channels last.
//
// Work: one or two vectors of channels of a picture are a task, which walks it in tiles of 8x8 pixels. So a channel's
// means belong to one task, in a fixed order, and nothing is exchanged. Fused: everything; the map is read once (its
// halo from cache) and written once. 98 FLOPs and 4 bytes (bfloat16) an element: bound by the multiply-adds.
//
// Backward recomputes the convolution instead of keeping it.
#include "cpu/depthwise_conv7.h"
#include "cpu/depthwise_gradients.h"
#include "cpu/gelu.h"
#include "cpu/sums.h"

namespace mra::cpu::MRA_ISA {
namespace {

// Convolves every tile, with two vectors of channels at most to a task, which walks a picture's tiles in order:
// visit(state, c, tile, conv) for each tile and vector of channels, conv: [8, 8]; end(state, b, c) after the last.
template <class State, class T, class Visit, class End>
inline void for_each_channel(const Map<const T>& x, const Convolution<T>& convolution, int threads, Visit visit,
                             End end) {
  constexpr int64_t kVectors = Conv7<T>::kVectors, kGroup = Convolution<T>::kGroup;
  const int64_t groups = (x.channels + kGroup - 1) / kGroup, tiles = x.tiles_y() * x.tiles_x();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < x.batch * groups; ++task) {
    const int64_t b = task / groups, first = task % groups * kGroup;
    const int64_t count = smaller(kVectors, (x.channels - first + kLanes - 1) / kLanes);
    State states[kVectors] = {};
    for (int64_t i = 0; i < tiles; ++i) {
      const Tile tile = tile_at(x, b * tiles + i);
      alignas(64) Floats conv[kVectors][kTile * kTile];
      convolution.run(
          x, tile, first, [](int) {},
          [&](int64_t c, int row, int column, Floats v) { conv[(c - first) / kLanes][row * kTile + column] = v; });
      for (int64_t v = 0; v < count; ++v) visit(states[v], first + v * kLanes, tile, conv[v]);
    }
    for (int64_t v = 0; v < count; ++v) end(states[v], b, first + v * kLanes);
  }
}

template <class T>
void forward(const DepthwiseConvGeluForward& a) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  const Map<T> y{static_cast<T*>(a.y), a.batch, a.height, a.width, a.channels};
  const Convolution<T> convolution(a.weight, a.bias, a.channels, false, a.place.threads);
  const float share = 1.0f / static_cast<float>(a.height * a.width);
  struct Sums {
    Floats y, x;
  };
  for_each_channel<Sums>(
      x, convolution, a.place.threads,
      [&](Sums& sums, int64_t c, const Tile& tile, const Floats* conv) {
        const int64_t lanes = a.channels - c;
        for_each_pixel(tile, [&](int64_t row, int64_t column) {
          const Floats v = gelu(conv[row * kTile + column]);
          sums.y += v;
          sums.x += load_first(x.pixel(tile.b, tile.y + row, tile.x + column) + c, lanes);
          store_first(y.pixel(tile.b, tile.y + row, tile.x + column) + c, v, lanes);
        });
      },
      [&](const Sums& sums, int64_t b, int64_t c) {
        store_first(a.y_mean + b * a.channels + c, sums.y * share, a.channels - c);
        store_first(a.x_mean + b * a.channels + c, sums.x * share, a.channels - c);
      });
}

// grad_conv: [B, H, W, C], the gradient of the convolution's output; bias: [B, padded], its sums over the pictures.
template <class T>
void conv_output_gradient(const DepthwiseConvGeluBackward& a, T* grad_conv, float* bias) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  const Map<const T> grad_y{static_cast<const T*>(a.grad_y), a.batch, a.height, a.width, a.channels};
  const Map<T> grad{grad_conv, a.batch, a.height, a.width, a.channels};
  const Convolution<T> convolution(a.weight, a.bias, a.channels, false, a.place.threads);
  const float share = 1.0f / static_cast<float>(a.height * a.width);
  for_each_channel<Floats>(
      x, convolution, a.place.threads,
      [&](Floats& total, int64_t c, const Tile& tile, const Floats* conv) {
        const int64_t lanes = a.channels - c;
        Floats of_mean = {};
        if (a.grad_y_mean != nullptr) of_mean = load_first(a.grad_y_mean + tile.b * a.channels + c, lanes) * share;
        for_each_pixel(tile, [&](int64_t row, int64_t column) {
          const int64_t i = tile.y + row, j = tile.x + column;
          Floats g = of_mean;
          if (a.grad_y != nullptr) g += load_first(grad_y.pixel(tile.b, i, j) + c, lanes);
          g *= gelu_slope(conv[row * kTile + column]);
          total += g;
          store_first(grad.pixel(tile.b, i, j) + c, g, lanes);
        });
      },
      [&](const Floats& total, int64_t b, int64_t c) { store(bias + b * x.padded() + c, total); });
}

// The part of the input's gradient that comes from its mean: [B, padded].
void mean_gradient(const DepthwiseConvGeluBackward& a, int64_t padded, float* constant) {
  const float share = 1.0f / static_cast<float>(a.height * a.width);
  for (int64_t b = 0; b < a.batch; ++b) {
    for_each_vector(a.channels, [&](int64_t c, int64_t lanes) {
      store(constant + b * padded + c, load_first(a.grad_x_mean + b * a.channels + c, lanes) * share);
    });
  }
}

template <class T>
void backward(const DepthwiseConvGeluBackward& a) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  Scratch<T> grad_conv(a.batch * a.height * a.width * a.channels);
  Scratch<float> vectors(a.batch * x.padded());
  conv_output_gradient(a, grad_conv.get(), vectors.get());
  sum_tasks(vectors.get(), a.batch, x.padded(), a.channels, static_cast<T*>(a.grad_bias));
  const Map<const T> grad{grad_conv.get(), a.batch, a.height, a.width, a.channels};
  if (a.grad_x != nullptr) {
    const float* constant = a.grad_x_mean == nullptr ? nullptr : vectors.get();
    if (constant != nullptr) mean_gradient(a, x.padded(), vectors.get());
    input_gradient(grad, a.weight, constant, a.place.threads, static_cast<T*>(a.grad_x));
  }
  if (a.grad_weight != nullptr) weight_gradient(x, grad, a.place.threads, static_cast<T*>(a.grad_weight));
}

}  // namespace

void depthwise_conv_gelu_forward(const DepthwiseConvGeluForward& a) {
  with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

void depthwise_conv_gelu_backward(const DepthwiseConvGeluBackward& a) {
  with_type(a.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
