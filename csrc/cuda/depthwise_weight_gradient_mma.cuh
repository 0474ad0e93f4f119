// The first stage of the taps' and bias's gradient on tensor cores, for 16-bit elements.
//
// For one channel and one column j of the filter, the products of 14 rows of the input and 8 rows of the gradient,
// summed over 16 columns, are a matrix product: [14, 16] times [16, 8]. Its entry (m, n) belongs to the filter's row m
// - n, so 56 of 16 * 8 sums are wanted. Shifting the gradient by a column gives the next j, while the input stays in
// registers. The sums live in tensor-core accumulators until the end; only then are their diagonals added up.
//
// Work: a warp has 8 channels, loaded as 16 bytes of each pixel, and some of the filter's columns; the warps of a block
// cover 32 channels and all columns, the last of them also the bias, for which the input is ones. A block marches down
// its strip in steps of 8 rows; the lower half of a product's rows is the next one's upper half, and is kept. Rows come
// through a ring in shared memory, swizzled so that the eight lanes of a load meet no bank twice.
//
// 4 bytes an element. For 8 rows, 16 columns and 32 channels, 204,800 of the 524,288 multiply-adds of 8 warps' 32
// products are useful; of an SM's cycles, shared memory takes 610, tensor cores 410 on sm_90, byte permutations 320,
// where the multiply-adds of float32 would take 1,568: bound by memory.
#pragma once

#include "common/mma.cuh"
#include "cuda/depthwise_weight_gradient.cuh"

namespace mra::cuda {

// How a block is cut: a warp has kShifts (4 or 2) of the filter's columns, and of 16 columns of the map kChunks.
template <int kShiftCount, int kChunkCount, int kStageCount>
struct WeightGradientMmaTile {
  static constexpr int kShifts = kShiftCount, kChunks = kChunkCount, kStages = kStageCount;
  static constexpr int kRows = 8, kColumns = 16 * kChunks;
  // Vectors of 8 channels of a pixel.
  static constexpr int kVector = 8, kVectors = 4, kChannels = kVector * kVectors;
  static constexpr int kThreads = 32 * kVectors * 8 / kShifts;
  // Pixels of a row of the input and of the gradient; odd numbers, so that neighboring rows start half the banks apart.
  static constexpr int kInputRow = kColumns + 1, kGradCount = kColumns + 2 * kHalo, kGradRow = kGradCount + 1;
  // Elements of a stage of the ring: rows of the input, then of the gradient.
  static constexpr int kInput = kRows * kInputRow * kChannels, kStage = kInput + kRows * kGradRow * kChannels;
  // Floats of a warp's products for one channel.
  static constexpr int kProducts = kShifts * 16 * 8;
};

// Where vector `v` of pixel `column` of a row of `row_pixels` is.
__device__ __forceinline__ int swizzled(int row, int row_pixels, int column, int v) {
  return ((row * row_pixels + column) * 4 + (v ^ (column / 2 % 4))) * 8;
}

// Copies the steps' rows to the ring: 8 of the gradient, and the 8 of the input that a product needs in addition to the
// last one's. At the top of each strip, and at its start, a block copies the first 8 of the input alone.
template <class T, class Tile, bool kWide>
struct WeightGradientMmaCopies {
  const T *grad, *x;  // [B, H, W, C], from the block's first channel on
  WeightGradientMaps maps;
  int b, strip, steps;
  WeightGradientWalk walk;
  int channels;  // of the block's that exist

  // 8 rows of kCount columns from (y, column) on; zeros outside the map.
  template <int kCount, int kRowPixels>
  __device__ __forceinline__ void copy_rows(T* to, const T* map, int y, int column) const {
    constexpr int kCopies = Tile::kRows * kCount * Tile::kVectors;
    const T* picture = map + static_cast<int64_t>(b) * maps.height * maps.width * maps.channels;
#pragma unroll
    for (int begin = 0; begin < kCopies; begin += Tile::kThreads) {
      const int i = begin + threadIdx.x;
      if (kCopies % Tile::kThreads != 0 && i >= kCopies) continue;
      const int v = i % Tile::kVectors, pixel = i / Tile::kVectors % kCount, row = i / (Tile::kVectors * kCount);
      const int at_y = y + row, at_x = column + pixel, c = v * Tile::kVector;
      const bool inside = at_y >= 0 && at_y < maps.height && at_x >= 0 && at_x < maps.width;
      const T* from = picture + (static_cast<int64_t>(at_y) * maps.width + at_x) * maps.channels + c;
      T* out = to + swizzled(row, kRowPixels, pixel, v);
      if constexpr (kWide) {
        if (inside && c < channels) {
          __pipeline_memcpy_async(out, from, 16);
        } else {
          store<Tile::kVector>(out, Floats<Tile::kVector>{});
        }
      } else {
#pragma unroll 1
        for (int k = 0; k < Tile::kVector; ++k) {
          if (inside && c + k < channels) {
            out[k] = from[k];
          } else {
            from_float(0.0f, out[k]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void next(T* stage) {
    const int column = strip * Tile::kColumns, y = (walk.y - walk.lead) * Tile::kRows;
    copy_rows<Tile::kColumns, Tile::kInputRow>(stage, x, y + Tile::kRows - kHalo, column);
    if (!walk.fills()) {
      copy_rows<Tile::kGradCount, Tile::kGradRow>(stage + Tile::kInput, grad, y, column - kHalo);
    }
    if (walk.advance(steps, 1) && ++strip == maps.strips) {
      strip = 0;
      ++b;
    }
  }
};

// A channel's elements of two neighboring pixels, from the 8 channels of each.
__device__ __forceinline__ uint32_t pair_of(const Elements<uint32_t, 4>& left, const Elements<uint32_t, 4>& right,
                                            int channel) {
  return __byte_perm(left.values[channel / 2], right.values[channel / 2], channel % 2 == 0 ? 0x5410 : 0x7632);
}

template <class T>
__device__ __forceinline__ Elements<uint32_t, 4> load_vector(const T* p) {
  return *reinterpret_cast<const Elements<uint32_t, 4>*>(p);
}

// Two ones.
template <class T>
__device__ __forceinline__ uint32_t ones();
template <>
__device__ __forceinline__ uint32_t ones<__nv_bfloat16>() {
  return 0x3f803f80u;
}
template <>
__device__ __forceinline__ uint32_t ones<__half>() {
  return 0x3c003c00u;
}

// Grid: x covers the channels, y cuts the `rows` of work, each 8 rows of a strip. partial: [gridDim.y, kSums, C].
template <class T, class Tile, bool kWide>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    depthwise_weight_gradient_mma_kernel(const T* __restrict__ grad, const T* __restrict__ x,
                                         float* __restrict__ partial, WeightGradientMaps maps, int rows,
                                         bool with_bias) {
  constexpr int kShifts = Tile::kShifts, kVector = Tile::kVector;
  extern __shared__ __align__(16) unsigned char memory[];
  T* ring = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int v = threadIdx.x / 32 % Tile::kVectors, part = threadIdx.x / (32 * Tile::kVectors);
  // The warp's columns of the filter. The middle one comes twice: the second time for the bias.
  const bool has_bias = part == 4 / kShifts;
  const int shift = part * kShifts - (part >= 4 / kShifts ? 1 : 0);

  const int channel = blockIdx.x * Tile::kChannels;
  const int first = static_cast<int>(static_cast<int64_t>(rows) * blockIdx.y / gridDim.y);
  const int count = static_cast<int>(static_cast<int64_t>(rows) * (blockIdx.y + 1) / gridDim.y) - first;
  const int height = (maps.height + Tile::kRows - 1) / Tile::kRows;
  WeightGradientWalk walk{first % height, 1};
  const int steps = count + (walk.y + count + height - 1) / height;
  const int strip = first / height;
  WeightGradientMmaCopies<T, Tile, kWide> copies{grad + channel,      x + channel, maps, strip / maps.strips,
                                                 strip % maps.strips, height,      walk, maps.channels - channel};
#pragma unroll 1
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) copies.next(ring + step * Tile::kStage);
    __pipeline_commit();
  }

  // The lane's first pixels in a stage: of the input, and of the gradient as the last of the shifts sees it.
  const int input_at = swizzled(g, Tile::kInputRow, 2 * t, v);
  int grad_at[kShifts + 1];
#pragma unroll
  for (int k = 0; k <= kShifts; ++k) {
    grad_at[k] = Tile::kInput + swizzled(g, Tile::kGradRow, 2 * t + kTaps - kShifts - shift + k, v);
  }
  // Eight and sixteen columns on: the swizzle is the same.
  constexpr int kEight = 8 * Tile::kChannels;

  float sums[kShifts][kVector][4] = {};
  uint32_t upper[Tile::kChunks][kVector][2] = {};  // of a product's rows
  for (int step = 0; step < steps; ++step) {
    __pipeline_wait_prior(Tile::kStages - 2);
    __syncthreads();
    // Into the stage that all have left behind.
    const int ahead = step + Tile::kStages - 1;
    if (ahead < steps) copies.next(ring + ahead % Tile::kStages * Tile::kStage);
    __pipeline_commit();
    const T* stage = ring + step % Tile::kStages * Tile::kStage;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      const T* inputs = stage + input_at + 2 * chunk * kEight;
      const Elements<uint32_t, 4> left[2] = {load_vector(inputs), load_vector(inputs + kEight)};
      const Elements<uint32_t, 4> right[2] = {load_vector(inputs + Tile::kChannels),
                                              load_vector(inputs + kEight + Tile::kChannels)};
      uint32_t lower[kVector][2];
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        lower[c][0] = pair_of(left[0], right[0], c);
        lower[c][1] = pair_of(left[1], right[1], c);
      }
      if (!walk.fills()) {
        Elements<uint32_t, 4> grads[2][kShifts + 1];
#pragma unroll
        for (int k = 0; k <= kShifts; ++k) {
          grads[0][k] = load_vector(stage + grad_at[k] + 2 * chunk * kEight);
          grads[1][k] = load_vector(stage + grad_at[k] + 2 * chunk * kEight + kEight);
        }
#pragma unroll
        for (int j = 0; j < kShifts; ++j) {
          const auto multiply = [&](int c, const uint32_t (&a)[4]) {
            const uint32_t low = pair_of(grads[0][kShifts - 1 - j], grads[0][kShifts - j], c);
            const uint32_t high = pair_of(grads[1][kShifts - 1 - j], grads[1][kShifts - j], c);
            mma<T>(sums[j][c], a, make_uint2(low, high));
          };
          if (j > 0 || !has_bias) {
#pragma unroll
            for (int c = 0; c < kVector; ++c) {
              multiply(c, {upper[chunk][c][0], lower[c][0], upper[chunk][c][1], lower[c][1]});
            }
          } else if (with_bias) {
#pragma unroll
            for (int c = 0; c < kVector; ++c) multiply(c, {ones<T>(), ones<T>(), ones<T>(), ones<T>()});
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        upper[chunk][c][0] = lower[c][0];
        upper[chunk][c][1] = lower[c][1];
      }
    }
    walk.advance(height, 1);
  }

  // The diagonals, a channel at a time; a lane has one tap.
  __syncthreads();
  float* products = reinterpret_cast<float*>(memory) + threadIdx.x / 32 * Tile::kProducts;
  const int mine = lane / kTaps, row = lane % kTaps;
  const bool is_bias = has_bias && mine == 0, adds = mine < kShifts && (!is_bias || row == 0);
  float totals[kVector] = {};
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
#pragma unroll
    for (int j = 0; j < kShifts; ++j) {
      float* out = products + (j * 16 + g) * 8 + 2 * t;
      store<2>(out, Floats<2>{{sums[j][c][0], sums[j][c][1]}});
      store<2>(out + 64, Floats<2>{{sums[j][c][2], sums[j][c][3]}});
    }
    __syncwarp();
    if (adds) {
#pragma unroll
      for (int n = 0; n < 8; ++n) totals[c] += products[(mine * 16 + row + n) * 8 + n];
    }
    __syncwarp();
  }
  if (!adds) return;
  const int sum = is_bias ? kSums - 1 : row * kTaps + shift + mine;
  float* out = partial + (static_cast<int64_t>(blockIdx.y) * kSums + sum) * maps.channels + channel + v * kVector;
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
    if (channel + v * kVector + c < maps.channels) out[c] = totals[c];
  }
}

}  // namespace mra::cuda
