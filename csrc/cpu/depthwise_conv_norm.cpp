// Depthwise 7x7 convolution + bias + LayerNorm over the channels, forward and backward, channels last.
//
// Work: tiles of 8x8 pixels with all their channels. A tile's convolution stays in a buffer of 64 * C floats in the
// second-level cache, where two passes give mean and variance. Its outputs are written while the next tile is
// convolved, a row of a few channels at a time, just before the convolution takes their place: so multiply-adds and
// stores to memory share the processor. The map is read once (its halo from cache) and written once. 98 FLOPs and 4
// bytes (bfloat16) an element: bound by the multiply-adds.
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

// The convolution of a tile before the norm: [C / kLanes, 8, 8, kLanes], in a buffer of the calling thread.
class TileBuffer {
 public:
  explicit TileBuffer(int64_t padded) : data_(thread_buffer<struct Outputs>(padded / kLanes * kStep)) {}

  float* at(int64_t row, int64_t column, int64_t c) const {
    return data_ + c / kLanes * kStep + (row * kTile + column) * kLanes;
  }

  // From a pixel's vector of channels to the next: some lines more than the tile has, so that not all of a pixel's
  // vectors meet in one set of the first-level cache.
  static constexpr int64_t kStep = (kTile * kTile + 8) * kLanes;

 private:
  float* data_;
};

// Normalizes tiles. Outputs that are streamed wait until the next tile is convolved.
template <class T>
class TileNorm {
 public:
  TileNorm(const DepthwiseConvNormForward& a, const Map<T>& y, const float* scale, const float* shift)
      : a_(a),
        y_(y),
        scale_(scale),
        shift_(shift),
        streams_(worth_streaming(y.data, y.batch * y.height * y.width, y.channels)),
        buffer_(y.padded()) {}

  // After `convolution` of a tile of x, its statistics are there, and its outputs there or waiting.
  void run(const Convolution<T>& convolution, const Map<const T>& x, const Tile& tile) {
    constexpr int64_t kGroup = Convolution<T>::kGroup, kLineBytes = 64;
    const TileBuffer buffer = buffer_;
    for (int64_t first = 0; first < x.channels; first += kGroup) {
      convolution.run(
          x, tile, first, [&](int row) { stream_group(row, first); },
          [=](int64_t c, int row, int column, Floats v) { store(buffer.at(row, column, c), v); });
    }
    for (int64_t row = Convolution<T>::rows(tile); row < tile_.rows; ++row) write_row(row);
    tile_ = tile;
    for (int64_t row = 0; row < tile.rows; ++row) find_statistics(row);
    // Streams of less than a line are slow.
    if (!streams_ || kGroup * sizeof(T) != kLineBytes) flush();
  }

  // Writes what waits.
  void flush() {
    for (int64_t row = 0; row < tile_.rows; ++row) write_row(row);
    tile_.rows = 0;
    finish_streams();
  }

 private:
  void find_statistics(int64_t row) {
    Statistics* s = statistics_ + row * kTile;
    row_statistics(buffer_.at(row, 0, 0), tile_.columns, kLanes, TileBuffer::kStep, y_.channels, a_.eps, s);
    const int64_t pixel = (tile_.b * y_.height + tile_.y + row) * y_.width + tile_.x;
    for (int64_t i = 0; i < tile_.columns; ++i) {
      a_.mean[pixel + i] = s[i].mean;
      a_.rstd[pixel + i] = s[i].rstd;
    }
  }

  // Writes the waiting outputs of a row.
  void write_row(int64_t row) const {
    for (int64_t i = 0; i < tile_.columns; ++i) {
      normalize(buffer_.at(row, i, 0), TileBuffer::kStep, statistics_[row * kTile + i], scale_, shift_, y_.channels,
                streams_, y_.pixel(tile_.b, tile_.y + row, tile_.x + i));
    }
  }

  // Streams those of a group of channels from c on, if the row has any.
  void stream_group(int64_t row, int64_t c) const {
    if (row >= tile_.rows) return;
    constexpr int kVectors = Conv7<T>::kVectors;
    // Nothing is read from a member in the loop: for all that the compiler knows, a store might change it.
    Floats scale[kVectors], shift[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      scale[v] = load(scale_ + c + v * kLanes);
      shift[v] = load(shift_ + c + v * kLanes);
    }
    const float* values = buffer_.at(row, 0, c);
    const Statistics* s = statistics_ + row * kTile;
    T* out = y_.pixel(tile_.b, tile_.y + row, tile_.x) + c;
    const int64_t columns = tile_.columns, channels = y_.channels;
    for (int64_t i = 0; i < columns; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Floats value = load(values + i * kLanes + v * TileBuffer::kStep);
        stream(out + i * channels + v * kLanes, normalize(value, s[i], scale[v], shift[v]));
      }
    }
  }

  const DepthwiseConvNormForward& a_;
  const Map<T> y_;
  const float *scale_, *shift_;
  const bool streams_;
  const TileBuffer buffer_;
  Tile tile_ = {};  // that waits
  Statistics statistics_[kTile * kTile];
};

template <class T>
void forward(const DepthwiseConvNormForward& a) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  const Map<T> y{static_cast<T*>(a.y), a.batch, a.height, a.width, a.channels};
  const Convolution<T> convolution(a.weight, a.bias, a.channels, false, a.place.threads);
  float *scale = thread_buffer<struct Scale>(x.padded()), *shift = thread_buffer<struct Shift>(x.padded());
  pack_vector(static_cast<const T*>(a.norm_weight), scale, a.channels);
  pack_vector(static_cast<const T*>(a.norm_bias), shift, a.channels);
  for_each_task(x, row_tasks(x, a.place.threads), a.place.threads, [&](int64_t, int64_t first, int64_t end) {
    TileNorm<T> norm(a, y, scale, shift);
    for (int64_t i = first; i < end; ++i) norm.run(convolution, x, tile_at(x, i));
    norm.flush();
  });
}

// grad_conv: [B, H, W, C], the gradient of the convolution's output; partial: [tasks, 3, padded], see NormSums.
template <class T>
void conv_output_gradient(const DepthwiseConvNormBackward& a, int64_t tasks, T* grad_conv, float* partial) {
  const Map<const T> x{static_cast<const T*>(a.x), a.batch, a.height, a.width, a.channels};
  const Map<const T> grad_y{static_cast<const T*>(a.grad_y), a.batch, a.height, a.width, a.channels};
  const int64_t padded = x.padded();
  const Convolution<T> convolution(a.weight, a.bias, a.channels, false, a.place.threads);
  float* scale = thread_buffer<struct Scale>(padded);
  pack_vector(static_cast<const T*>(a.norm_weight), scale, a.channels);
  std::memset(partial, 0, tasks * NormSums::kRows * padded * sizeof(float));
  for_each_tile(x, tasks, a.place.threads, [&](int64_t task, const Tile& tile) {
    const TileBuffer conv(padded);
    for (int64_t first = 0; first < x.channels; first += Convolution<T>::kGroup) {
      convolution.run(
          x, tile, first, [&](int row) { fetch_row(grad_y, tile, row, first); },
          [&](int64_t c, int row, int column, Floats v) { store(conv.at(row, column, c), v); });
    }
    const NormSums sums = NormSums::at(partial + task * NormSums::kRows * padded, padded);
    for_each_pixel(tile, [&](int64_t row, int64_t column) {
      const int64_t pixel = (tile.b * a.height + tile.y + row) * a.width + tile.x + column;
      normalize_backward(grad_y.pixel(tile.b, tile.y + row, tile.x + column), conv.at(row, column, 0),
                         TileBuffer::kStep, Statistics{a.mean[pixel], a.rstd[pixel]}, scale, a.channels, sums, false,
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
  if (a.grad_x != nullptr) input_gradient(grad, a.weight, nullptr, a.place.threads, static_cast<T*>(a.grad_x));
  if (a.grad_weight != nullptr) weight_gradient(x, grad, a.place.threads, static_cast<T*>(a.grad_weight));
}

}  // namespace

void depthwise_conv_norm_forward(const DepthwiseConvNormForward& a) {
  with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

void depthwise_conv_norm_backward(const DepthwiseConvNormBackward& a) {
  with_type(a.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
