// Depthwise 7x7 convolution on tensor cores, for 16-bit elements; sums are in float32, as in depthwise_conv7.cuh.
//
// Of one channel and one row of the filter, 8 neighboring outputs are the 14 inputs around them times a band matrix,
// whose entry (k, n) is tap k - n. A product of a warp takes 16 such tiles of a row at once: [16, 16] times [16, 8].
// The seven band matrices of a channel stay in registers, 14 of them; an input row is loaded once and goes into the
// sums of seven output rows, which move up by one with each input row, as in depthwise_conv7.cuh.
//
// Work: a warp has two channels, a block 16, and 16 tiles of 8 columns: of one strip of rows, or of two or four below
// each other where the map is narrower. It marches down its strips. Each step of the march, between two barriers, works
// on four rows at once: cp.async fetches one into a ring, channels last as in the map; the next is transposed, so that
// 8 columns of a channel are 16 bytes in a row; products are taken of the one transposed before; and outputs of the one
// before that, transposed back, leave as whole sectors. Shared memory is swizzled: no access meets a bank twice, but
// for two of 32 rows that a product loads of four strips.
//
// For 128 pixels of two channels a warp issues 14 products, of which 44% of the multiply-adds are useful, and on sm_90
// some 100 other instructions; on the float32 units they are 392 multiply-adds and 167 others. For four warps' share an
// SM of an H200 needs 112 cycles of its tensor cores, 113 of instructions and 112 of shared memory, but 220 of DRAM for
// 4 bytes an element: bound by memory.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "common/mma.cuh"
#include "cuda/depthwise_conv7.cuh"

namespace mra::cuda {

// Threads of a block, blocks resident on an SM, and rows of the ring.
constexpr int kMmaThreads = 256, kMmaBlocks = 2, kMmaStages = 6;

// How a block of threads is cut: 16 tiles of 8 columns, of kStripCount (1, 2 or 4) strips of rows.
template <int kStripCount>
struct DepthwiseMmaTile {
  static constexpr bool kMma = true;
  static constexpr int kThreads = kMmaThreads, kWarps = kThreads / 32, kChannels = 2 * kWarps;
  static constexpr int kStrips = kStripCount, kTiles = 16 / kStrips, kColumns = 8 * kTiles;
  // Of a strip's input row: halo included, and two more, so that all come in eights. Eights are transposed in pairs.
  static constexpr int kInputEights = kTiles + 1, kEights = (kStrips * kInputEights + 1) / 2 * 2;

  // Elements of a row of the ring, in channels-last order, and of the buffers that a step of the march alternates with:
  // a transposed row, [kChannels, 24, 8], and outputs, [kChannels, 16, 8].
  static constexpr int kRow = kEights * 8 * kChannels;
  static constexpr int kChannelRow = 24 * 8, kTransposed = kChannels * kChannelRow;
  static constexpr int kChannelOutput = 16 * 8, kOutput = kChannels * kChannelOutput;
  static constexpr int kElements = kMmaStages * kRow + 2 * kTransposed + 2 * kOutput;
  static_assert(kEights <= 24 && kStrips * kTiles == 16, "");

  // A channel's taps while the bands are built: seven rows with zeros around them, tap 0 at place 8.
  static constexpr int kTapRow = 24, kTapElements = kChannels * kSide * kTapRow;
  static_assert(kTapElements <= 2 * kTransposed, "taps wait where transposed rows come later");

  // Where a product's tile m lies: its strip, and its place in that.
  __device__ static constexpr int strip(int m) { return m / kTiles; }
  __device__ static constexpr int tile(int m) { return m % kTiles; }

  // Where 8 elements are: vector v of a pixel in the ring; eight pixels of a channel; tile m of a channel's outputs.
  __device__ static constexpr int in_ring(int pixel, int v) { return (2 * pixel + (v ^ (pixel / 4 % 2))) * 8; }
  __device__ static constexpr int in_transposed(int channel, int eight) {
    return channel * kChannelRow + (eight ^ (channel % 8)) * 8;
  }
  __device__ static constexpr int in_outputs(int channel, int m) {
    return channel * kChannelOutput + (m ^ (channel % 2 * 2 + channel / 8 * 4)) * 8;
  }
};

// A number that the compiler cannot compute again where it is used: kept in a register instead.
__device__ __forceinline__ int pinned(int value) { return __shfl_sync(0xffffffffu, value, threadIdx.x % 32); }

// The block's part once more, as if it were another one: after a march, so that no number waits for that in a register.
template <class Tile, class T>
__device__ __forceinline__ DepthwisePart depthwise_part_again(const DepthwiseProblem<T>& p) {
  return depthwise_part<Tile>(p, pinned(blockIdx.x / p.channel_tiles), pinned(blockIdx.x % p.channel_tiles));
}

// The copies of a block's rows to the ring, a row of each of its strips at a time, halo included: 16 bytes a thread,
// and 16 more of the first warps', kThreads / 2 pixels further on.
template <class T, class Tile>
class DepthwiseMmaRows {
 public:
  __device__ __forceinline__ DepthwiseMmaRows(const DepthwiseProblem<T>& p, const DepthwisePart& part, T* ring)
      : p_(p), ring_(ring + pinned(Tile::in_ring(threadIdx.x / 2, threadIdx.x % 2))) {
    const int pixel = threadIdx.x / 2, channel = part.channel + threadIdx.x % 2 * 8;
    const int column = part.column - kHalo + pixel % kStripPixels;
    row_ = part.row - kHalo + pixel / kStripPixels * p.rows;
    from_ = p.x + ((static_cast<int64_t>(part.picture) * p.height + row_) * p.width + column) * p.channels + channel;
    const auto inside = [&](int first) { return channel < p.channels && first >= 0 && first < p.width; };
    inside_[0] = inside(column);
    inside_[1] = inside(column + kMoreColumns);
    other_inside_[0] = inside(column + kHalo);
    other_inside_[1] = inside(column + kHalo + kMoreColumns);
  }

  // Starts to copy the next row of each strip to `to` elements into the ring; zeros outside the map.
  __device__ __forceinline__ void copy_next(int to) {
    copy(to, 0, 0, inside_);
    advance();
  }

  // The same, and to `other_to` kHalo rows and columns further on of a map of the same shape, `bytes` from x to there.
  __device__ __forceinline__ void copy_next(int to, int other_to, int64_t bytes) {
    copy(to, 0, 0, inside_);
    copy(other_to, bytes, kHalo, other_inside_);
    advance();
  }

 private:
  static constexpr int kPixels = Tile::kThreads / 2, kStripPixels = 8 * Tile::kInputEights;
  static constexpr int kMorePixels = 8 * Tile::kEights - kPixels;
  static constexpr int kMoreStrips = kPixels / kStripPixels, kMoreColumns = kPixels % kStripPixels;
  static_assert(kMorePixels % 16 == 0 && (kMorePixels + kMoreColumns <= kStripPixels || Tile::kStrips == 1),
                "whole warps copy more, of one strip");

  __device__ __forceinline__ void copy(int to, int64_t bytes, int rows, const bool (&inside)[2]) const {
    const auto copy_vector = [&](T* vector, int64_t elements, int row, bool inside) {
      inside = inside && static_cast<unsigned>(row) < static_cast<unsigned>(p_.height);
      const auto from = reinterpret_cast<uintptr_t>(from_ + elements) + bytes;
      __pipeline_memcpy_async(vector, reinterpret_cast<const T*>(from), 16, inside ? 0 : 16);
    };
    copy_vector(ring_ + to, 0, row_ + rows, inside[0]);
    if (threadIdx.x < 2 * kMorePixels) {
      const int more_rows = kMoreStrips * p_.rows;
      const int64_t row_elements = p_.width * p_.channels;
      copy_vector(ring_ + to + 8 * Tile::kThreads, more_rows * row_elements + int64_t{kMoreColumns} * p_.channels,
                  row_ + rows + more_rows, inside[1]);
    }
  }

  __device__ __forceinline__ void advance() {
    ++row_;
    from_ += p_.width * p_.channels;
  }

  const DepthwiseProblem<T>& p_;
  T* const ring_;
  const T* from_;
  int row_;
  bool inside_[2], other_inside_[2];
};

// Transposes rows of the ring: a warp takes two eights of pixels and both vectors of 8 channels; of the matrix of eight
// e and vector v a thread gets channel 8 v + g of pixels 2t and 2t + 1.
template <class T, class Tile>
class DepthwiseMmaTranspose {
 public:
  __device__ __forceinline__ DepthwiseMmaTranspose(const T* ring, T* transposed) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    pixels_ = ring + pinned(Tile::in_ring(16 * warp + lane / 16 * 8 + lane % 8, lane / 8 % 2));
    const int column = pinned(Tile::in_transposed(g, 2 * warp) + 2 * t);
    columns_[0] = transposed + column;
    columns_[1] = transposed + (column ^ 8);
  }

  // Of the row `from` elements into the ring, `to` elements into what is transposed.
  __device__ __forceinline__ void operator()(int from, int to) const {
#pragma unroll
    for (int first = 0; first < Tile::kEights; first += 2 * Tile::kWarps) {
      if (first + 2 * Tile::kWarps > Tile::kEights && first + threadIdx.x / 32 * 2 >= Tile::kEights) break;
      uint32_t m[4];
      load_transposed(m, pixels_ + from + first * 8 * Tile::kChannels);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T* out = columns_[i / 2] + to + i % 2 * 8 * Tile::kChannelRow + first * 8;
        *reinterpret_cast<uint32_t*>(out) = m[i];
      }
    }
  }

 private:
  const T* pixels_;
  T* columns_[2];
};

// The seven band matrices of a warp's two channels.
template <class T, class Tile>
__device__ __forceinline__ void load_bands(const DepthwiseProblem<T>& p, const DepthwisePart& part, T* memory,
                                           uint2 (&bands)[2][kSide]) {
  const T* const weight = p.weight + static_cast<int64_t>(part.channel) * kTaps;
  for (int i = threadIdx.x; i < Tile::kTapElements; i += Tile::kThreads) {
    const int x = i % Tile::kTapRow - 8, row = i / Tile::kTapRow % kSide, channel = i / (Tile::kTapRow * kSide);
    const int tap = row * kSide + x;
    if (x >= 0 && x < kSide && part.channel + channel < p.channels) {
      memory[i] = weight[channel * kTaps + (p.flipped ? kTaps - 1 - tap : tap)];
    } else {
      from_float(0.0f, memory[i]);
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto* const taps = reinterpret_cast<const uint16_t*>(memory) + 8 + 2 * t - g;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int row = 0; row < kSide; ++row) {
      const uint16_t* k = taps + ((threadIdx.x / 32 * 2 + c) * kSide + row) * Tile::kTapRow;
      bands[c][row] = {k[0] | uint32_t{k[1]} << 16, k[8] | uint32_t{k[9]} << 16};
    }
  }
  __syncthreads();
}

// Convolves a part of the map. Each thread calls read(row, inputs) for each input row from kHalo above its strips to
// kHalo below them, with its fragments of the warp's two channels, and finish(row, c, sums) for each row of them, in
// order, to turn channel c's sums, biased, into outputs: columns 2t, 2t + 1 of tile g, then of g + 8; `row` counts from
// the strip's first one. Lanes beyond the map compute, too.
template <class T, class Tile, class Read, class Finish>
__device__ __forceinline__ void depthwise_mma_march(const DepthwiseProblem<T>& p, const DepthwisePart& part,
                                                    unsigned char* memory, Read read, Finish finish) {
  T* const ring = reinterpret_cast<T*>(memory);
  T* const transposed = ring + kMmaStages * Tile::kRow;
  T* const outputs = transposed + 2 * Tile::kTransposed;
  const int input_rows = p.rows + kSide - 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  DepthwiseMmaRows<T, Tile> rows(p, part, ring);
#pragma unroll 1
  for (int i = 0; i < kMmaStages; ++i) {
    if (i < input_rows) rows.copy_next(i * Tile::kRow);
    __pipeline_commit();
  }
  uint2 bands[2][kSide];
  load_bands<T, Tile>(p, part, transposed, bands);
  float start[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int c = part.channel + 2 * warp + i;
    start[i] = c < p.channels ? depthwise_start(p, part.picture, c) : 0.0f;
  }

  const DepthwiseMmaTranspose<T, Tile> transpose(ring, transposed);

  // A product's rows: the lane names the first or second eight inputs of tile lane % 16.
  const int input = lane % 16 + Tile::strip(lane % 16) + lane / 16;
  const int first_input = pinned(Tile::in_transposed(2 * warp, input));
  const T* const inputs_at[2] = {transposed + first_input, transposed + (first_input ^ 8) + Tile::kChannelRow};

  // Outputs leave as 8 channels of a pixel: matrix i has channels 2i and 2i + 1 of both vectors and of two tiles, so
  // that a thread gets one vector of pixel g.
  const int output = pinned(Tile::in_outputs(2 * warp, g) + 2 * t);
  T* const outputs_at[2] = {outputs + output, outputs + (output ^ 16) + Tile::kChannelOutput};
  const int from = lane % 8, to = 2 * warp + t / 2, channel = part.channel + t % 2 * 8;
  const T* const leaving =
      outputs + pinned(Tile::in_outputs(from / 2 % 2 * 8 + lane / 8 * 2 + from % 2, 2 * warp + from / 4));
  const int y_row = part.row + Tile::strip(to) * p.rows, y_column = part.column + 8 * Tile::tile(to) + g;
  const int y_rows = y_column < p.width && channel < p.channels ? p.height - y_row : 0;
  T* y = p.y + ((static_cast<int64_t>(part.picture) * p.height + y_row) * p.width + y_column) * p.channels + channel;
  const auto store_row = [&](int row, int buffer) {
    uint32_t v[4];
    load_transposed(v, leaving + buffer * Tile::kOutput);
    if (row < y_rows) *reinterpret_cast<uint4*>(y) = make_uint4(v[0], v[1], v[2], v[3]);
    y += p.width * p.channels;
  };

  // sums[c][k]: those of the row that is complete after k more input rows; zeros of the row that comes next.
  float sums[2][kSide + 1][4] = {};
  int stage = 0;
  __pipeline_wait_prior(kMmaStages - 1);
  __syncthreads();
  transpose(0, 0);
#pragma unroll 1
  for (int i = 0; i < input_rows; i += 2) {
#pragma unroll
    for (int buffer = 0; buffer < 2; ++buffer) {
      if (i + buffer >= input_rows) break;
      __pipeline_wait_prior(kMmaStages - 2);
      __syncthreads();
      if (i + buffer + kMmaStages < input_rows) rows.copy_next(stage);
      __pipeline_commit();
      stage = stage + Tile::kRow == kMmaStages * Tile::kRow ? 0 : stage + Tile::kRow;
      const int row = i + buffer - (kSide - 1);
      if (row > 0) store_row(row - 1, 1 - buffer);

      // One channel after the other: both at once need more registers.
      uint32_t inputs[4];
      load_matrices(inputs, inputs_at[0] + buffer * Tile::kTransposed);
      // After the last row this is an old one, which nothing uses.
      transpose(stage, (1 - buffer) * Tile::kTransposed);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (c > 0) load_matrices(inputs, inputs_at[c] + buffer * Tile::kTransposed);
        read(i + buffer - kHalo, c, inputs);
#pragma unroll
        for (int k = 0; k < kSide; ++k) mma<T>(sums[c][k], inputs, bands[c][kSide - 1 - k], sums[c][k + 1]);
        if (row < 0) continue;
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = sums[c][0][j] + start[c];
        finish(row, c, v);
        T* const to = outputs_at[c] + buffer * Tile::kOutput;
        store<2>(to, Floats<2>{{v[0], v[1]}});
        store<2>(to + 64, Floats<2>{{v[2], v[3]}});
      }
    }
  }
  __syncthreads();
  store_row(p.rows - 1, (p.rows - 1) % 2);
}

// A tile's products multiply a NaN or an infinity by the zeros of a band, too, and make a NaN of all its columns.
// Computes the NaNs among the block's outputs again, one by one.
template <class T, class Tile, class Finish>
__device__ __forceinline__ void depthwise_mma_repair(const DepthwiseProblem<T>& p, const DepthwisePart& part,
                                                     Finish finish) {
  const int c = part.channel + threadIdx.x % Tile::kChannels;
  if (c >= p.channels) return;
  const int64_t picture = static_cast<int64_t>(part.picture) * p.height;
  const T* const weight = p.weight + static_cast<int64_t>(c) * kTaps;
  const int last = min(p.height, part.row + Tile::kStrips * p.rows);
  for (int y = part.row; y < last; ++y) {
    for (int i = threadIdx.x / Tile::kChannels; i < Tile::kColumns; i += Tile::kThreads / Tile::kChannels) {
      const int x = part.column + i;
      if (x >= p.width) break;
      T& out = p.y[((picture + y) * p.width + x) * p.channels + c];
      if (!isnan(to_float(out))) continue;
      float sum = depthwise_start(p, part.picture, c);
#pragma unroll 1
      for (int tap = 0; tap < kTaps; ++tap) {
        const int from_y = y + tap / kSide - kHalo, from_x = x + tap % kSide - kHalo;
        if (from_y < 0 || from_y >= p.height || from_x < 0 || from_x >= p.width) continue;
        const T value = p.x[((picture + from_y) * p.width + from_x) * p.channels + c];
        sum = fmaf(to_float(value), to_float(weight[p.flipped ? kTaps - 1 - tap : tap]), sum);
      }
      from_float(finish(sum), out);
    }
  }
}

// y = bias + constant + the convolution.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kMmaBlocks) depthwise_conv7_mma_kernel(DepthwiseProblem<T> p) {
  extern __shared__ __align__(16) unsigned char memory[];
  const DepthwisePart part = depthwise_part<Tile>(p);
  float zero = 0;  // NaN after a sum that is not finite
  depthwise_mma_march<T, Tile>(
      p, part, memory, [](int, int, const uint32_t (&)[4]) {},
      [&](int, int, const float (&sums)[4]) {
#pragma unroll
        for (float sum : sums) zero = fmaf(sum, 0.0f, zero);
      });
  if (!__syncthreads_or(isnan(zero))) return;
  depthwise_mma_repair<T, Tile>(p, depthwise_part_again<Tile>(p), [](float sum) { return sum; });
}

}  // namespace mra::cuda
