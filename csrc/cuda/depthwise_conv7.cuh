// Depthwise 7x7 convolution, channels last, zeros around the picture; the epilogue is the caller's.
//
// Work: a thread owns one channel of 8 neighboring pixels and marches down a strip of rows. It keeps its channel's 49
// taps in registers and reads each input row once: 14 values from shared memory serve 7 x 8 x 7 multiply-adds, into
// seven rows of 8 sums. The sums' rows move up by one with each input row: the first multiply-add into a row reads the
// row below it, so that moving costs nothing and the loop's body is one input row. A block is four warps: 1, 2 or 4
// groups of 8 columns, of 128, 64 or 32 channels. Its input rows, halo included, wait in a ring in shared memory that
// cp.async fills several rows ahead.
//
// 98 FLOPs and 8 bytes (float32) an element: bound by the rate of FFMA. For 16-bit elements there are tensor cores, see
// depthwise_conv7_mma.cuh, unless an address or C does not allow accesses of 16 bytes.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "common/elements.cuh"

namespace mra::cuda {

constexpr int kSide = 7, kTaps = kSide * kSide, kHalo = kSide / 2;
// Pixels of a row that a thread computes, and those that it reads.
constexpr int kOutputs = 8, kInputs = kOutputs + kSide - 1;

// Threads of a block, and blocks resident on an SM.
constexpr int kDepthwiseThreads = 128, kDepthwiseBlocks = 3;

// How a block of threads is cut: into kTileGroups groups of columns.
template <int kTileGroups>
struct DepthwiseTile {
  static constexpr int kThreads = kDepthwiseThreads;
  static constexpr int kGroups = kTileGroups, kChannels = kThreads / kGroups;
  static constexpr int kColumns = kGroups * kOutputs;
  static constexpr int kInputColumns = kColumns + kSide - 1;
  static constexpr int kStrips = 1;
  static constexpr bool kMma = false;
};

// A convolution, and how its map is cut into blocks: channels first, then columns, strips of rows and pictures.
template <class T>
struct DepthwiseProblem {
  const T* x;             // [B, H, W, C]
  const T* weight;        // [C, 1, 7, 7]
  const T* bias;          // [C], or null
  const float* constant;  // [B, C], or null
  T* y;                   // [B, H, W, C]
  int height, width, channels;
  int rows;  // of a strip
  // Strips count as one where a block has several of them below each other.
  int strips, column_tiles, channel_tiles;
  bool flipped;
};

// A block's part of the map. Coordinates fit 32 bits, offsets need 64.
struct DepthwisePart {
  int picture, strip, column_tile;
  int row, rows, column, channel;  // `rows` rows from `row` on (of the first strip), the tile's columns and channels
};

// unit: a column tile of a strip of a picture.
template <class Tile, class T>
__device__ __forceinline__ DepthwisePart depthwise_part(const DepthwiseProblem<T>& p, int unit, int channel_tile) {
  DepthwisePart part;
  part.channel = channel_tile * Tile::kChannels;
  part.column_tile = unit % p.column_tiles;
  part.column = part.column_tile * Tile::kColumns;
  unit /= p.column_tiles;
  part.strip = unit % p.strips;
  part.row = part.strip * p.rows * Tile::kStrips;
  part.rows = min(p.rows, p.height - part.row);
  part.picture = unit / p.strips;
  return part;
}

// The part of a block of a grid that covers channels first.
template <class Tile, class T>
__device__ __forceinline__ DepthwisePart depthwise_part(const DepthwiseProblem<T>& p) {
  return depthwise_part<Tile>(p, blockIdx.x / p.channel_tiles, blockIdx.x % p.channel_tiles);
}

// What is added to a channel's convolution.
template <class T>
__device__ __forceinline__ float depthwise_start(const DepthwiseProblem<T>& p, int picture, int channel) {
  float start = 0;
  if (p.bias != nullptr) start = to_float(p.bias[channel]);
  if (p.constant != nullptr) start += p.constant[static_cast<int64_t>(picture) * p.channels + channel];
  return start;
}

// The block's input rows in shared memory: [kStages, kInputColumns, kChannels], filled kVector elements at a time.
template <class T, class Tile, int kStages, int kVector>
class RowRing {
 public:
  static constexpr int kRow = Tile::kInputColumns * Tile::kChannels;
  static constexpr int kBytes = kStages * kRow * static_cast<int>(sizeof(T));

  __device__ __forceinline__ RowRing(const DepthwiseProblem<T>& p, const DepthwisePart& part, T* memory)
      : x_(p.x), memory_(memory), height_(p.height), width_(p.width), channels_(p.channels) {
    const int vector = threadIdx.x % kVectors * kVector, first = threadIdx.x / kVectors;
    column_ = part.column - kHalo + first;
    inside_ = part.channel + vector < p.channels;
    to_ = first * Tile::kChannels + vector;
    row_ = part.row - kHalo;
    offset_ = ((static_cast<int64_t>(part.picture) * p.height + row_) * p.width + column_) * p.channels + part.channel +
              vector;
  }

  // Starts to copy the next row of the map.
  __device__ __forceinline__ void copy_next() {
    const bool inside = inside_ && row_ >= 0 && row_ < height_;
#pragma unroll
    for (int first = 0; first < Tile::kInputColumns; first += kStep) {
      // The last pass has no column left for some threads.
      if (first + kStep > Tile::kInputColumns && threadIdx.x / kVectors + first >= Tile::kInputColumns) break;
      const int column = column_ + first;
      const bool valid = inside && column >= 0 && column < width_;
      const T* from = x_ + (valid ? offset_ + static_cast<int64_t>(first) * channels_ : 0);
      T* to = memory_ + slot_ * kRow + to_ + first * Tile::kChannels;
      if constexpr (kVector > 1) {
        constexpr int kSize = kVector * static_cast<int>(sizeof(T));
        __pipeline_memcpy_async(to, from, kSize, valid ? 0 : kSize);
      } else {
        T value;
        from_float(0.0f, value);
        if (valid) value = *from;
        *to = value;
      }
    }
    slot_ = slot_ + 1 == kStages ? 0 : slot_ + 1;
    ++row_;
    offset_ += static_cast<int64_t>(width_) * channels_;
  }

 private:
  static constexpr int kVectors = Tile::kChannels / kVector, kStep = Tile::kThreads / kVectors;
  static_assert(Tile::kThreads % kVectors == 0, "a thread copies the same channels of each of its columns");

  const T* const x_;
  T* const memory_;
  const int height_, width_, channels_;
  int row_, column_, slot_ = 0, to_;  // of the thread's first vector
  int64_t offset_;
  bool inside_;  // whether the map has its channels
};

// Shared memory: the ring, then the block's taps, [kChannels, 49].
template <class T, class Tile, int kStages>
constexpr int depthwise_bytes() {
  return RowRing<T, Tile, kStages, 1>::kBytes + Tile::kChannels * kTaps * static_cast<int>(sizeof(float));
}

// Convolves a part of the map. Each thread calls finish(row, sums) for each row of the strip, in order, with its
// channel's sums of kOutputs pixels, and read(row, values) for each input row from kHalo above the strip to kHalo below
// it, with the kInputs values from kHalo before its first pixel on; `row` counts from the strip's first one. Lanes
// beyond the map's last channel and pixels beyond its last column compute, too.
template <class T, class Tile, int kStages, int kVector, class Read, class Finish>
__device__ __forceinline__ void depthwise_march(const DepthwiseProblem<T>& p, const DepthwisePart& part,
                                                unsigned char* memory, Read read, Finish finish) {
  using Ring = RowRing<T, Tile, kStages, kVector>;
  T* const rows = reinterpret_cast<T*>(memory);
  float* const block_taps = reinterpret_cast<float*>(memory + Ring::kBytes);
  const int input_rows = part.rows + kSide - 1;

  Ring ring(p, part, rows);
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < input_rows) ring.copy_next();
    __pipeline_commit();
  }

  // Neighboring threads load neighboring taps; a channel's are 49 apart, which no two banks share.
  const int channels = min(Tile::kChannels, p.channels - part.channel);
  const T* const weight = p.weight + static_cast<int64_t>(part.channel) * kTaps;
  for (int i = threadIdx.x; i < Tile::kChannels * kTaps; i += Tile::kThreads) {
    block_taps[i] = i < channels * kTaps ? to_float(weight[i]) : 0.0f;
  }
  __syncthreads();
  const int channel = threadIdx.x % Tile::kChannels, group = threadIdx.x / Tile::kChannels;
  float taps[kTaps];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) taps[i] = block_taps[channel * kTaps + (p.flipped ? kTaps - 1 - i : i)];
  const float start = channel < channels ? depthwise_start(p, part.picture, part.channel + channel) : 0.0f;

  // sums[k]: those of the row that is complete after k more input rows.
  float sums[kSide][kOutputs] = {};
  const T* const first = rows + group * kOutputs * Tile::kChannels + channel;
  int slot = 0;
#pragma unroll 1
  for (int i = 0; i < input_rows; ++i) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();
    if (i + kStages - 1 < input_rows) ring.copy_next();
    __pipeline_commit();

    const T* const values = first + slot * Ring::kRow;
    slot = slot + 1 == kStages ? 0 : slot + 1;
    float v[kInputs];
#pragma unroll
    for (int j = 0; j < kInputs; ++j) v[j] = to_float(values[j * Tile::kChannels]);
    read(i - kHalo, v);
#pragma unroll
    for (int k = 0; k < kSide; ++k) {
      // Above and below the strip are other blocks' rows.
      const int row = i - (kSide - 1) + k;
      if (row < 0 || row >= part.rows) continue;
#pragma unroll
      for (int x = 0; x < kSide; ++x) {
        const float tap = taps[(kSide - 1 - k) * kSide + x];
#pragma unroll
        for (int j = 0; j < kOutputs; ++j) {
          const float before = x > 0 ? sums[k][j] : k + 1 < kSide ? sums[k + 1][j] : start;
          sums[k][j] = fmaf(v[j + x], tap, before);
        }
      }
    }
    if (i >= kSide - 1) finish(i - (kSide - 1), sums[0]);
  }
}

// y = bias + constant + the convolution.
template <class T, class Tile, int kStages, int kVector>
__global__ void __launch_bounds__(Tile::kThreads, kDepthwiseBlocks) depthwise_conv7_kernel(DepthwiseProblem<T> p) {
  extern __shared__ __align__(16) unsigned char memory[];
  const DepthwisePart part = depthwise_part<Tile>(p);
  const int channel = part.channel + threadIdx.x % Tile::kChannels;
  const int column = part.column + threadIdx.x / Tile::kChannels * kOutputs;
  const int columns = channel < p.channels ? p.width - column : 0;
  T* y = p.y + ((static_cast<int64_t>(part.picture) * p.height + part.row) * p.width + column) * p.channels + channel;
  depthwise_march<T, Tile, kStages, kVector>(
      p, part, memory, [](int, const float*) {},
      [&](int, const float* sums) {
#pragma unroll
        for (int j = 0; j < kOutputs; ++j) {
          if (j < columns) from_float(sums[j], y[static_cast<int64_t>(j) * p.channels]);
        }
        y += static_cast<int64_t>(p.width) * p.channels;
      });
}

}  // namespace mra::cuda
