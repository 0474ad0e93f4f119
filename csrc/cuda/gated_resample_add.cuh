// low + gate * resample(high), channels last: average pool, same grid, or bilinear with aligned corners.
//
// Work: a thread owns 16 bytes of channels of one pixel (one element where an address or C does not allow that); the
// blocks of a grid row share one row of the map, so that a thread's pixel needs one division. Fused: the
// resampling, the gate and the sum. Bytes, on one grid: 3 * C elements a pixel; 2 FLOPs an element: bound by memory.
//
// Backward gathers: each high-resolution pixel sums the low-resolution pixels that read it, so nothing is atomic. The
// gate's gradient is summed by one block for each row of the low grid, then over the rows in order: bitwise repeatable.
#pragma once

#include "common/elements.cuh"
#include "common/resample.h"
#include "launch.h"

namespace mra::cuda {

constexpr int kThreads = 256;
// Resident blocks an SM: named, because without a number the compiler spills to reach the full 2,048 threads.
constexpr int kBlocks = 4;

enum class Mode { kSame, kPool, kBilinear };

// The high-resolution map as the low grid sees it.
template <class T>
struct High {
  const T* data;  // [B, H', W', C]
  int height, width, channels;
  int window_y, window_x;  // kPool
  float scale_y, scale_x;  // kBilinear

  // Coordinates fit 32 bits, offsets need 64.
  __device__ __forceinline__ const T* pixel(int b, int y, int x) const {
    return data + ((static_cast<int64_t>(b) * height + y) * width + x) * channels;
  }

  // kCount channels from c on, of what low-resolution pixel (b, y, x) sees.
  template <Mode kMode, int kCount>
  __device__ __forceinline__ Floats<kCount> read(int b, int y, int x, int c) const {
    if constexpr (kMode == Mode::kSame) return load<kCount>(pixel(b, y, x) + c);
    Floats<kCount> total = {};
    if constexpr (kMode == Mode::kPool) {
      const float weight = 1.0f / static_cast<float>(window_y * window_x);
      for (int i = 0; i < window_y; ++i) {
        for (int j = 0; j < window_x; ++j) {
          accumulate(total, weight, load<kCount>(pixel(b, y * window_y + i, x * window_x + j) + c));
        }
      }
    } else {
      const Bilinear v = bilinear(y, height, scale_y), h = bilinear(x, width, scale_x);
      accumulate(total, (1 - v.fraction) * (1 - h.fraction), load<kCount>(pixel(b, v.first, h.first) + c));
      accumulate(total, (1 - v.fraction) * h.fraction, load<kCount>(pixel(b, v.first, h.second) + c));
      accumulate(total, v.fraction * (1 - h.fraction), load<kCount>(pixel(b, v.second, h.first) + c));
      accumulate(total, v.fraction * h.fraction, load<kCount>(pixel(b, v.second, h.second) + c));
    }
    return total;
  }
};

// Grid: x covers a row's W * C / kCount vectors, y strides over the B * H rows.
template <class T, Mode kMode, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gated_resample_add_kernel(const T* __restrict__ low, High<T> high, const float* __restrict__ gate,
                              T* __restrict__ y, int rows, int height, int width, int vectors) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= width * vectors) return;
  const int x = i / vectors, c = i % vectors * kCount;
  for (int row = blockIdx.y; row < rows; row += gridDim.y) {
    const int b = row / height;
    const int64_t offset = (static_cast<int64_t>(row) * width + x) * high.channels + c;
    Floats<kCount> out = load<kCount>(low + offset);
    accumulate(out, gate[b], high.template read<kMode, kCount>(b, row % height, x, c));
    store<kCount>(y + offset, out);
  }
}

// As above, over the rows of the high grid. low_height, low_width: of grad_y.
template <class T, Mode kMode, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gated_resample_add_high_gradient_kernel(const T* __restrict__ grad_y, High<T> high, const float* __restrict__ gate,
                                            T* __restrict__ grad_high, int rows, int low_height, int low_width,
                                            int vectors) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= high.width * vectors) return;
  const int x = i / vectors, c = i % vectors * kCount;
  for (int row = blockIdx.y; row < rows; row += gridDim.y) {
    const int b = row / high.height, y = row % high.height;
    const T* grad = grad_y + static_cast<int64_t>(b) * low_height * low_width * high.channels + c;
    Floats<kCount> total = {};
    if constexpr (kMode == Mode::kBilinear) {
      const Range ys = bilinear_readers(y, low_height, high.scale_y), xs = bilinear_readers(x, low_width, high.scale_x);
      for (int p = ys.begin; p < ys.end; ++p) {
        const float weight_y = gate[b] * bilinear_weight(bilinear(p, high.height, high.scale_y), y);
        for (int q = xs.begin; q < xs.end; ++q) {
          const float weight_x = bilinear_weight(bilinear(q, high.width, high.scale_x), x);
          // A reader with weight zero must not bring in its NaN.
          if (weight_y == 0.0f || weight_x == 0.0f) continue;
          const int64_t reader = static_cast<int64_t>(p) * low_width + q;
          accumulate(total, weight_y * weight_x, load<kCount>(grad + reader * high.channels));
        }
      }
    } else {
      const int64_t reader = static_cast<int64_t>(y / high.window_y) * low_width + x / high.window_x;
      const float weight = gate[b] / static_cast<float>(high.window_y * high.window_x);
      accumulate(total, weight, load<kCount>(grad + reader * high.channels));
    }
    store<kCount>(grad_high + (static_cast<int64_t>(row) * high.width + x) * high.channels + c, total);
  }
}

// One block for each row of the low grid: partial[b, y] = sum over x and c of grad_y * resample(high).
template <class T, Mode kMode, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gated_resample_add_gate_partial_kernel(const T* __restrict__ grad_y, High<T> high, float* __restrict__ partial,
                                           int height, int width, int vectors) {
  const int row = blockIdx.x, b = row / height, y = row % height;
  const T* grad_row = grad_y + static_cast<int64_t>(row) * width * high.channels;
  float total = 0;
  for (int i = threadIdx.x; i < width * vectors; i += kThreads) {
    const int x = i / vectors, c = i % vectors * kCount;
    const Floats<kCount> grad = load<kCount>(grad_row + static_cast<int64_t>(x) * high.channels + c);
    const Floats<kCount> value = high.template read<kMode, kCount>(b, y, x, c);
#pragma unroll
    for (int k = 0; k < kCount; ++k) total = fmaf(grad.values[k], value.values[k], total);
  }
  total = block_sum<kThreads>(total);
  if (threadIdx.x == 0) partial[row] = total;
}

// One block for each picture: grad_gate[b] = sum over y of partial[b, y].
template <int kBlock>
__global__ void __launch_bounds__(kBlock)
    gated_resample_add_gate_kernel(const float* __restrict__ partial, float* __restrict__ grad_gate, int height) {
  const float* mine = partial + static_cast<int64_t>(blockIdx.x) * height;
  float total = 0;
  for (int y = threadIdx.x; y < height; y += kBlock) total += mine[y];
  total = block_sum<kBlock>(total);
  if (threadIdx.x == 0) grad_gate[blockIdx.x] = total;
}

}  // namespace mra::cuda
