// Gradients of a depthwise 7x7 convolution's taps and bias, channels last:
//   grad_weight[c, i, j] = sum over b, y, x of grad[b, y, x, c] * input[b, y + i - 3, x + j - 3, c],
//   grad_bias[c] = sum over b, y, x of grad[b, y, x, c].
//
// Work: a lane owns two channels and all their 49 sums, a warp a few columns of the gradient, which it marches down.
// For each row of the input it loads the columns' ten values once and multiplies them with the seven rows of the
// gradient that see them, which wait in registers: a window of seven rows whose oldest gives way to the next, so that
// loops are unrolled by seven and every index is known to the compiler. Rows come through a ring in shared memory,
// filled by asynchronous copies six rows ahead. Blocks cut the rows of the *input* among themselves: then each row
// meets all its seven, and the only thing done twice is to load six rows of the gradient at each block's start.
//
// Every block leaves its 50 sums a channel in scratch; a second kernel adds them in a fixed order: bitwise repeatable.
//
// 98 FLOPs and 8 bytes (float32) an element: bound by the multiply-adds. For 16-bit elements there are tensor cores,
// see depthwise_weight_gradient_mma.cuh, unless an address or C does not allow accesses of 16 bytes.
#pragma once

#include "cuda/depthwise_conv7.cuh"

namespace mra::cuda {

// Of each channel: the taps', and the bias's.
constexpr int kSums = kTaps + 1;
// Of a block: two to each lane of a warp.
constexpr int kBlockChannels = 64;

// How a block is cut: its warps side by side, each with kPixels columns of the gradient.
template <int kWarpCount, int kPixelCount>
struct WeightGradientTile {
  static constexpr int kWarps = kWarpCount, kPixels = kPixelCount, kThreads = 32 * kWarps;
  // Columns of a block, in the gradient and in the input.
  static constexpr int kColumns = kWarps * kPixels, kInputs = kColumns + 2 * kHalo;
  // Elements of a slot of the ring: a row of the input, then one of the gradient. As many slots as the window has rows,
  // so that the compiler knows their addresses, too.
  static constexpr int kSlot = (kInputs + kColumns) * kBlockChannels, kSlots = kSide;
  // Floats in which half of the warps hand their sums to the others.
  static constexpr int kExchange = kWarps / 2 * kSums * kBlockChannels;
};

// The maps as the blocks see them. A row of work is (b, strip, y), y innermost; all but offsets fit 32 bits.
struct WeightGradientMaps {
  int height, width, channels, strips;
};

// A block's way through its rows of work, a step at a time. At the top of each strip, and at its start, it makes `lead`
// steps that only fill registers.
struct WeightGradientWalk {
  int y, lead;

  __device__ __forceinline__ bool fills() const { return lead > 0; }

  // Whether a strip was left. height: rows of work of a strip.
  __device__ __forceinline__ bool advance(int height, int new_lead) {
    if (lead > 0) {
      --lead;
    } else if (++y == height) {
      y = 0;
      lead = new_lead;
      return true;
    }
    return false;
  }
};

// Copies rows to the ring: of each step one of the gradient, and, unless it only fills the window, one of the input.
// kWide: 16 bytes at a time; addresses and C allow it.
template <class T, class Tile, bool kWide>
struct WeightGradientCopies {
  const T *grad, *x;  // [B, H, W, C], from the block's first channel on
  WeightGradientMaps maps;
  int b, strip;
  WeightGradientWalk walk;
  int channels;  // of the block's that exist

  // kCount columns from `column` on of row `y`; zeros outside the map.
  template <int kCount>
  __device__ __forceinline__ void copy_row(T* slot, const T* map, int y, int column) const {
    const bool inside = y >= 0 && y < maps.height;
    const T* row = map + (static_cast<int64_t>(b) * maps.height + y) * maps.width * maps.channels;
    if constexpr (kWide) {
      constexpr int kCopy = 16 / sizeof(T), kCopies = kBlockChannels / kCopy;
      const int c = threadIdx.x % kCopies * kCopy;
#pragma unroll
      for (int i = threadIdx.x / kCopies; i < kCount; i += Tile::kThreads / kCopies) {
        T* to = slot + i * kBlockChannels + c;
        if (inside && column + i >= 0 && column + i < maps.width && c < channels) {
          __pipeline_memcpy_async(to, row + (column + i) * maps.channels + c, 16);
        } else {
          store<kCopy>(to, Floats<kCopy>{});
        }
      }
    } else {
      for (int i = threadIdx.x; i < kCount * kBlockChannels; i += Tile::kThreads) {
        const int c = i % kBlockChannels, at = column + i / kBlockChannels;
        if (inside && at >= 0 && at < maps.width && c < channels) {
          slot[i] = row[at * maps.channels + c];
        } else {
          from_float(0.0f, slot[i]);
        }
      }
    }
  }

  __device__ __forceinline__ void next(T* slot) {
    const int column = strip * Tile::kColumns, y = walk.y - walk.lead;
    if (!walk.fills()) copy_row<Tile::kInputs>(slot, x, y, column - kHalo);
    copy_row<Tile::kColumns>(slot + Tile::kInputs * kBlockChannels, grad, y + kHalo, column);
    if (walk.advance(maps.height, kSide - 1) && ++strip == maps.strips) {
      strip = 0;
      ++b;
    }
  }
};

// Adds the sums of a block's warps, each [kSums, 2] of a lane, in a fixed order; the first warp has them then.
template <class Tile>
__device__ __forceinline__ void add_warps(float* exchange, Floats<2> (&sums)[kSums]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = Tile::kWarps / 2; half > 0; half /= 2) {
    __syncthreads();
    float* mine = exchange + warp % half * kSums * kBlockChannels + 2 * lane;
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) store<2>(mine + i * kBlockChannels, sums[i]);
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) accumulate(sums[i], 1.0f, load<2>(mine + i * kBlockChannels));
    }
  }
}

// Grid: x covers the channels, y cuts the `rows` of work. partial: [gridDim.y, kSums, C].
template <class T, class Tile, bool kWide, int kBlocks>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks)
    depthwise_weight_gradient_kernel(const T* __restrict__ grad, const T* __restrict__ x, float* __restrict__ partial,
                                     WeightGradientMaps maps, int rows, bool with_bias) {
  extern __shared__ __align__(16) unsigned char memory[];
  T* ring = reinterpret_cast<T*>(memory);
  const int channel = blockIdx.x * kBlockChannels, lane = threadIdx.x % 32;
  const int first = static_cast<int64_t>(rows) * blockIdx.y / gridDim.y;
  const int count = static_cast<int>(static_cast<int64_t>(rows) * (blockIdx.y + 1) / gridDim.y) - first;
  WeightGradientWalk walk{first % maps.height, kSide - 1};
  const int steps = count + (walk.y + count + maps.height - 1) / maps.height * (kSide - 1);
  const int strip = first / maps.height;
  WeightGradientCopies<T, Tile, kWide> copies{
      grad + channel, x + channel, maps, strip / maps.strips, strip % maps.strips, walk, maps.channels - channel};
#pragma unroll 1
  for (int step = 0; step < Tile::kSlots - 1; ++step) {
    if (step < steps) copies.next(ring + step * Tile::kSlot);
    __pipeline_commit();
  }

  Floats<2> sums[kSums] = {};
  Floats<2> window[kSide][Tile::kPixels] =
      {};  // rows of the gradient: the last one in `phase`, the one before below it
  const T* mine = ring + threadIdx.x / 32 * Tile::kPixels * kBlockChannels + 2 * lane;
  for (int begin = 0; begin < steps; begin += kSide) {
#pragma unroll
    for (int phase = 0; phase < kSide; ++phase) {
      const int step = begin + phase;
      if (step < steps) {
        __pipeline_wait_prior(Tile::kSlots - 2);
        __syncthreads();
        // Into the slot that all have left behind.
        if (step + Tile::kSlots - 1 < steps) copies.next(ring + (phase + kSide - 1) % kSide * Tile::kSlot);
        __pipeline_commit();
        const T* inputs = mine + phase * Tile::kSlot;
        const T* grads = inputs + Tile::kInputs * kBlockChannels;
#pragma unroll
        for (int k = 0; k < Tile::kPixels; ++k) window[phase][k] = load<2>(grads + k * kBlockChannels);
        if (!walk.fills()) {
          Floats<2> values[Tile::kPixels + 2 * kHalo];
#pragma unroll
          for (int k = 0; k < Tile::kPixels + 2 * kHalo; ++k) values[k] = load<2>(inputs + k * kBlockChannels);
#pragma unroll
          for (int i = 0; i < kSide; ++i) {
            // The gradient's row that sees the input's row through the filter's row i.
            const Floats<2>* row = window[(phase + kSide - i) % kSide];
#pragma unroll
            for (int k = 0; k < Tile::kPixels; ++k) {
#pragma unroll
              for (int j = 0; j < kSide; ++j) {
                Floats<2>& sum = sums[i * kSide + j];
                sum.values[0] = fmaf(row[k].values[0], values[k + j].values[0], sum.values[0]);
                sum.values[1] = fmaf(row[k].values[1], values[k + j].values[1], sum.values[1]);
              }
            }
          }
          if (with_bias) {
#pragma unroll
            for (int k = 0; k < Tile::kPixels; ++k) {
              accumulate(sums[kSums - 1], 1.0f, window[(phase + kSide - kHalo) % kSide][k]);
            }
          }
        }
        walk.advance(maps.height, kSide - 1);
      }
    }
  }

  add_warps<Tile>(reinterpret_cast<float*>(memory), sums);
  if (threadIdx.x >= 32) return;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    float* out = partial + (static_cast<int64_t>(blockIdx.y) * kSums + i) * maps.channels + channel + 2 * lane;
    if (channel + 2 * lane < maps.channels) out[0] = sums[i].values[0];
    if (channel + 2 * lane + 1 < maps.channels) out[1] = sums[i].values[1];
  }
}

constexpr int kSliceChannels = 32, kSlices = 8;

// Adds the blocks' sums. Grid: x covers the channels, y the kSums sums; each of a block's slices adds every eighth
// part. grad_weight: [C, 7, 7], grad_bias: [C], each or null.
template <class T>
__global__ void __launch_bounds__(kSliceChannels* kSlices)
    depthwise_weight_gradient_sum_kernel(const float* __restrict__ partial, T* __restrict__ grad_weight,
                                         T* __restrict__ grad_bias, int parts, int channels) {
  __shared__ float slices[kSlices][kSliceChannels];
  const int c = blockIdx.x * kSliceChannels + threadIdx.x, sum = blockIdx.y;
  float total = 0;
  if (c < channels) {
    const int64_t stride = static_cast<int64_t>(kSums) * channels;
    const float* mine = partial + static_cast<int64_t>(sum) * channels + c;
#pragma unroll 8
    for (int part = threadIdx.y; part < parts; part += kSlices) total += mine[part * stride];
  }
  slices[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || c >= channels) return;
  total = 0;
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) total += slices[slice][threadIdx.x];
  if (sum == kSums - 1) {
    if (grad_bias != nullptr) from_float(total, grad_bias[c]);
  } else if (grad_weight != nullptr) {
    from_float(total, grad_weight[static_cast<int64_t>(c) * (kSums - 1) + sum]);
  }
}

}  // namespace mra::cuda
