// LayerNorm over rows of C channels, forward and backward; statistics in float32, in two passes over registers.
//
// Work: 1 to 128 threads a row, so that each holds at most 4 (backward: 3) vectors of 16 bytes of it, all loaded at
// once: 8 threads for 192 channels of 16 bits, 64 for 1536. A row too long for that is read again, from cache. Where an
// address or C does not allow 16 bytes, a vector is one element.
// Forward reads and writes each element once: 4 C bytes a row in 16 bits, about 22 instructions an element, bound by
// memory. 1024 x 1024 pixels at batch 1: 50 MB for 65536 x 192, 25 for 16384 x 384, 13 for 4096 x 768, 6 for
// 1024 x 1536.
//
// Backward moves 6 C bytes a row in 16 bits, about 30 instructions an element, bound by memory as well. A block takes a
// run of rows and keeps the sums over them (of the gradients of weight and bias, and of x) in registers: 24 channels x
// 3 sums a thread. Each block writes its own, and a second kernel adds them in order: nothing is atomic, results
// repeat.
#pragma once

#include "common/rows.cuh"

namespace mra::cuda {

// Vectors of a row that a thread keeps: 32 channels, in backward 24, whose sums fill its registers.
template <int kCount>
constexpr int kNormKept = kCount == 8 ? 4 : 8;
template <int kCount>
constexpr int kNormBackwardKept = kCount == 8 ? 3 : 6;

constexpr int kNormBackwardBlocks = 3;  // resident on an SM
// Sums over the rows: gradients of weight and bias, and the gradient of x itself.
constexpr int kNormSums = 3;

// `Order` says where row r of x lies among the rows of y and grad_y; negative where it has no place.
struct SameOrder {
  __device__ __forceinline__ int64_t operator()(int64_t row) const { return row; }
};

struct Statistics {
  float mean, rstd;
};

// The statistics of the block's rows; those of dead rows (vectors = 0) mean nothing.
template <class Row, int kKept>
__device__ __forceinline__ Statistics row_statistics(const Row& x, int vectors, int channels, float eps) {
  const float share = 1.0f / channels;
  float sum[1] = {}, squares[1] = {};
  for_each_vector<kKept>(vectors, [&](int i, int k) {
    const auto v = x.at(i, k);
    float total = 0;
    for (float value : v.values) total += value;
    sum[0] += total;
  });
  row_sum(sum);
  const float mean = sum[0] * share;
  for_each_vector<kKept>(vectors, [&](int i, int k) {
    const auto v = x.at(i, k);
    float total = 0;
    for (float value : v.values) total = fmaf(value - mean, value - mean, total);
    squares[0] += total;
  });
  row_sum(squares);
  return {mean, rsqrtf(squares[0] * share + eps)};
}

// Grid: rows / blockDim.y. y may be x.
template <class T, int kCount, class Order>
__global__ void __launch_bounds__(kRowThreads, 8)
    layer_norm_kernel(const T* x, const T* __restrict__ weight, const T* __restrict__ bias, T* y,
                      float* __restrict__ mean, float* __restrict__ rstd, int64_t rows, int channels, float eps,
                      Order order) {
  using Row = KeptRow<T, kCount, kNormKept<kCount>>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int vectors = row < rows ? channels / kCount : 0;
  const Row values(x + row * channels, vectors);
  const Statistics s = row_statistics<Row, kNormKept<kCount>>(values, vectors, channels, eps);
  if (row >= rows) return;
  if (threadIdx.x == 0) {
    if (mean != nullptr) mean[row] = s.mean;
    if (rstd != nullptr) rstd[row] = s.rstd;
  }
  const int64_t target = order(row);
  if (target < 0) return;
  for_each_vector<kNormKept<kCount>>(vectors, [&](int i, int k) {
    const int c = i * kCount;
    const Floats<kCount> v = values.at(i, k), scale = load<kCount>(weight + c), shift = load<kCount>(bias + c);
    Floats<kCount> out;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      out.values[j] = fmaf((v.values[j] - s.mean) * s.rstd, scale.values[j], shift.values[j]);
    }
    store<kCount>(y + target * channels + c, out);
  });
}

// Block b takes rows [rows * b / blocks, rows * (b + 1) / blocks). partial: [blocks, 3, C], or null. grad_x may be
// null, grad_y (in the same order) or x.
// On sm_80 a float32 row needs a few registers more than three blocks leave it.
template <class T, int kCount, class Order>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 4 ? 2 : kNormBackwardBlocks)
    layer_norm_backward_kernel(const T* grad_y, const T* x, const T* __restrict__ weight,
                               const float* __restrict__ mean, const float* __restrict__ rstd, T* grad_x,
                               float* __restrict__ partial, int64_t rows, int channels, float eps, Order order) {
  constexpr int kKept = kNormBackwardKept<kCount>;
  using Row = KeptRow<T, kCount, kKept>;
  const int64_t first = rows * blockIdx.x / gridDim.x, last = rows * (blockIdx.x + 1) / gridDim.x;
  const float share = 1.0f / channels;
  ColumnSums<kRowThreads, kCount, kKept, kNormSums> sums;
  // Channels that registers do not hold are summed in the block's own part of `partial`, by one thread each.
  float* mine = partial == nullptr ? nullptr : partial + static_cast<int64_t>(blockIdx.x) * kNormSums * channels;
  const auto add = [&](int sum, int i, int k, int j, float v) {
    if (k >= 0) {
      sums.values[sum][k][j] += v;
    } else if (mine != nullptr) {
      mine[static_cast<int64_t>(sum) * channels + i * kCount + j] += v;
    }
  };
  if (mine != nullptr) {
    for (int c = kKept * blockDim.x * kCount + threadIdx.x; c < channels; c += blockDim.x)
      for (int sum = 0; sum < kNormSums; ++sum) mine[static_cast<int64_t>(sum) * channels + c] = 0;
  }
  __syncthreads();
  for (int64_t start = first; start < last; start += blockDim.y) {
    const int64_t row = start + threadIdx.y, source = row < last ? order(row) : -1;
    const int vectors = source >= 0 ? channels / kCount : 0;
    const Row values(x + row * channels, vectors), grads(grad_y + source * channels, vectors);
    Statistics s;
    if (mean == nullptr) {
      s = row_statistics<Row, kKept>(values, vectors, channels, eps);
    } else {
      s = {vectors > 0 ? mean[row] : 0.0f, vectors > 0 ? rstd[row] : 0.0f};
    }
    // Sums over the row: of the scaled gradient, and of its product with the normalized value.
    float dots[2] = {};
    for_each_vector<kKept>(vectors, [&](int i, int k) {
      const Floats<kCount> v = values.at(i, k), g = grads.at(i, k), scale = load<kCount>(weight + i * kCount);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float normal = (v.values[j] - s.mean) * s.rstd, scaled = g.values[j] * scale.values[j];
        dots[0] += scaled;
        dots[1] = fmaf(scaled, normal, dots[1]);
        add(0, i, k, j, g.values[j] * normal);
        add(1, i, k, j, g.values[j]);
      }
    });
    row_sum(dots);
    const float average = dots[0] * share, slope = dots[1] * share;
    for_each_vector<kKept>(vectors, [&](int i, int k) {
      const Floats<kCount> v = values.at(i, k), g = grads.at(i, k), scale = load<kCount>(weight + i * kCount);
      Floats<kCount> out;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float normal = (v.values[j] - s.mean) * s.rstd;
        out.values[j] = (fmaf(g.values[j], scale.values[j], -average) - normal * slope) * s.rstd;
        add(2, i, k, j, out.values[j]);
      }
      if (grad_x != nullptr) store<kCount>(grad_x + row * channels + i * kCount, out);
    });
    if (grad_x != nullptr && row < last && source < 0) {
      for_each_vector<0>(channels / kCount, [&](int i, int) {
        store<kCount>(grad_x + row * channels + static_cast<int64_t>(i) * kCount, Floats<kCount>{});
      });
    }
  }
  if (mine != nullptr) sums.write(mine, channels, channels);
}

}  // namespace mra::cuda
