// The first stage of the taps' and bias's gradient on tensor cores, for 16-bit elements, in the march of
// depthwise_conv7_mma.cuh.
//
// For one channel, one row of the input and one of the gradient, the products of a tile's 16 inputs and 8 gradients,
// summed over 16 tiles, are a matrix product: [16, 16] times [16, 8]. Its entry (m, n) belongs to the filter's column
// m - n, so 56 of 128 sums are wanted; the filter's row is the distance of the two rows. Inputs 14 and 15 meet no tap:
// ones in place of the last add up the gradient itself. A row of the input meets the last seven of the gradient, which
// stay in registers, and the sums stay in accumulators until the end; only then are their diagonals added up.
//
// Work: a warp has two channels, a block 16, and a run of units, each 16 tiles wide and as high as its strips, around
// which it reads the halo of the input. Rows of both maps are copied and transposed as those of the forward are. Loops
// are unrolled by seven rows, so that a row of the gradient stays where it is.
//
// 4 bytes an element. For 128 pixels of two channels 14 products, of which 44% of the multiply-adds are useful, among
// some 137 instructions on sm_90. For four warps' share an SM of an H200 needs 112 cycles of its tensor cores, 137 of
// instructions and 144 of shared memory, but 220 of DRAM: bound by memory.
#pragma once

#include <type_traits>

#include "cuda/depthwise_conv7_mma.cuh"
#include "cuda/depthwise_weight_gradient.cuh"

namespace mra::cuda {

// Bytes of shared memory: of the ring and what is transposed, of both maps; then of the products of a channel of each
// warp.
template <class T, class Tile>
constexpr int weight_gradient_mma_bytes() {
  constexpr int kMaps = 2 * (kMmaStages * Tile::kRow + 2 * Tile::kTransposed) * static_cast<int>(sizeof(T));
  constexpr int kProducts = Tile::kWarps * kSide * 16 * 8 * static_cast<int>(sizeof(float));
  return kMaps > kProducts ? kMaps : kProducts;
}

// Two ones.
template <class T>
constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00u : 0x3f803f80u;

// Grid: x covers the channels, y cuts the `units` of the maps: column tiles, strips and pictures. partial: [gridDim.y,
// kSums, C].
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kMmaBlocks)
    depthwise_weight_gradient_mma_kernel(DepthwiseProblem<T> p, const T* __restrict__ grad, float* __restrict__ partial,
                                         int units) {
  extern __shared__ __align__(16) unsigned char memory[];
  // Rows of the input, then of the gradient, in each stage of the ring and in each buffer.
  T* const ring = reinterpret_cast<T*>(memory);
  T* const transposed = ring + kMmaStages * 2 * Tile::kRow;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  constexpr int kStage = 2 * Tile::kRow, kBuffer = 2 * Tile::kTransposed;
  const DepthwiseMmaTranspose<T, Tile> transpose(ring, transposed);
  const auto transpose_both = [&](int from, int to) {
    transpose(from, to);
    transpose(from + Tile::kRow, to + Tile::kTransposed);
  };

  // Operands, transposed on the way to registers, since products sum over tiles: of a, matrices 0 and 1 are the first
  // and the second eight inputs of tiles 0-7, 2 and 3 of tiles 8-15; of b, tiles 0-7 and 8-15 of both channels.
  const int a_tile = lane % 8 + lane / 16 * 8, a_eight = a_tile + Tile::strip(a_tile) + lane / 8 % 2;
  const int first_input = pinned(Tile::in_transposed(2 * warp, a_eight));
  const int b_tile = lane % 16;
  const T* const grads_at =
      transposed + Tile::kTransposed + Tile::in_transposed(2 * warp + lane / 16, b_tile + Tile::strip(b_tile));

  // From an input to the gradient kHalo rows and columns further on: a step copies the gradient's row i and the input's
  // row i - kHalo.
  const int64_t distance =
      reinterpret_cast<intptr_t>(grad + int64_t{kHalo} * (p.width + 1) * p.channels) - reinterpret_cast<intptr_t>(p.x);
  float sums[2][kSide][4] = {};
  const int input_rows = p.rows + kSide - 1;
  const int last_unit = static_cast<int>(static_cast<int64_t>(units) * (blockIdx.y + 1) / gridDim.y);
#pragma unroll 1
  for (int unit = static_cast<int64_t>(units) * blockIdx.y / gridDim.y; unit < last_unit; ++unit) {
    const DepthwisePart part = depthwise_part<Tile>(p, unit, blockIdx.x);
    DepthwiseMmaRows<T, Tile> rows(p, part, ring);
    __syncthreads();  // all have left the last unit
#pragma unroll 1
    for (int i = 0; i < kMmaStages; ++i) {
      if (i < input_rows) rows.copy_next(i * kStage, i * kStage + Tile::kRow, distance);
      __pipeline_commit();
    }
    // Rows of the gradient: the last one in `phase`, the one before below it.
    uint2 grads[2][kSide] = {};
    int stage = 0, buffer = 0;
    __pipeline_wait_prior(kMmaStages - 1);
    __syncthreads();
    transpose_both(0, 0);
#pragma unroll 1
    for (int first = 0; first < input_rows; first += kSide) {
#pragma unroll
      for (int phase = 0; phase < kSide; ++phase) {
        const int row = first + phase;
        if (row >= input_rows) break;
        __pipeline_wait_prior(kMmaStages - 2);
        __syncthreads();
        if (row + kMmaStages < input_rows) rows.copy_next(stage, stage + Tile::kRow, distance);
        __pipeline_commit();
        stage = stage + kStage == kMmaStages * kStage ? 0 : stage + kStage;
        grads[0][phase] = grads[1][phase] = {0, 0};
        if (row < p.rows) {
          uint32_t m[4];
          load_transposed(m, grads_at + buffer);
          grads[0][phase] = {m[0], m[1]};
          grads[1][phase] = {m[2], m[3]};
        }
        const int now = buffer;
        buffer = kBuffer - buffer;
        // After the last row these are old ones, which nothing uses.
        transpose_both(stage, buffer);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          uint32_t inputs[4];
          load_transposed(inputs, transposed + ((first_input + now) ^ (8 * c)) + c * Tile::kChannelRow);
          if (g == 7) inputs[1] = inputs[3] = kOnes<T>;  // input 15
#pragma unroll
          for (int k = 0; k < kSide; ++k) mma<T>(sums[c][k], inputs, grads[c][(phase + kSide - k) % kSide]);
        }
      }
    }
  }

  // The diagonals, a channel at a time; a lane has one or two taps.
  __syncthreads();
  float* const products = reinterpret_cast<float*>(memory) + warp * kSide * 16 * 8;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int k = 0; k < kSide; ++k) {
      float* out = products + (k * 16 + g) * 8 + 2 * t;
      store<2>(out, Floats<2>{{sums[c][k][0], sums[c][k][1]}});
      store<2>(out + 64, Floats<2>{{sums[c][k][2], sums[c][k][3]}});
    }
    __syncwarp();
    const int channel = blockIdx.x * Tile::kChannels + 2 * warp + c;
    float* const out = partial + static_cast<int64_t>(blockIdx.y) * kSums * p.channels + channel;
    for (int sum = lane; sum < kSums && channel < p.channels; sum += 32) {
      float value = 0;
      // A diagonal, or the row of the ones.
      const int first = sum < kTaps ? (sum / kSide * 16 + sum % kSide) * 8 : 15 * 8, step = sum < kTaps ? 9 : 1;
#pragma unroll
      for (int n = 0; n < 8; ++n) value += products[first + n * step];
      out[static_cast<int64_t>(sum) * p.channels] = value;
    }
    __syncwarp();
  }
}

}  // namespace mra::cuda
