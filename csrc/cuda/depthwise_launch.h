// How a depthwise convolution is cut into blocks, and from a dtype and addresses to the kernel of that cut.
#pragma once

#include <algorithm>

#include "common/launch_cuda.h"
#include "common/with_type.h"
#include "cuda/depthwise_conv7_mma.cuh"

namespace mra::cuda {

// Rows in flight in the ring of a block that computes in float32.
constexpr int kDepthwiseStages = 4;

// Of a strip.
constexpr int64_t kMostRows = 64;

// How a map is cut into blocks. Cuts follow from the sizes alone, so that sums are the same on every device.
struct DepthwiseCut {
  int split;     // a block's groups of columns; on tensor cores its strips
  int64_t rows;  // of a strip
  int64_t strips, column_tiles, channel_tiles;
  int64_t parts;  // of a picture, whose sums are written apart

  int64_t blocks(int64_t batch) const { return batch * strips * column_tiles * channel_tiles; }

  // The cut with the least time by a simple count: waves of blocks, each as long as its rows and what starting costs.
  static DepthwiseCut of(bool mma, int64_t batch, int64_t height, int64_t width, int64_t channels) {
    constexpr int64_t kMultiprocessors = 132;  // of an H200
    // Halo rows, taps and the first rows' latency, in rows of work.
    const int64_t start = mma ? 12 : 4, slots = kMultiprocessors * (mma ? kMmaBlocks : kDepthwiseBlocks);
    DepthwiseCut best{};
    int64_t least = INT64_MAX;
    for (int i = 0; i < 3; ++i) {
      // The one with the fewest halo columns first.
      const int split = mma ? 1 << i : 4 >> i;
      const int64_t block_columns = mma ? 128 / split : split * kOutputs, block_strips = mma ? split : 1;
      const int64_t block_channels = mma ? kMmaThreads / 32 * 2 : kDepthwiseThreads / split;
      DepthwiseCut cut{};
      cut.split = split;
      cut.column_tiles = (width + block_columns - 1) / block_columns;
      cut.channel_tiles = (channels + block_channels - 1) / block_channels;
      for (cut.rows = 1; cut.rows <= std::min(height, kMostRows); ++cut.rows) {
        cut.strips = (height + block_strips * cut.rows - 1) / (block_strips * cut.rows);
        cut.parts = cut.strips * cut.column_tiles * (mma ? 1 : split);
        const int64_t waves = (cut.blocks(batch) + slots - 1) / slots;
        const int64_t time = waves * (cut.rows + start);
        if (time >= least) continue;
        least = time;
        best = cut;
      }
    }
    return best;
  }
};

// Lets a kernel have the shared memory that its block needs; the bytes.
template <class Kernel>
int depthwise_memory(Kernel kernel, int bytes) {
  if (bytes > 48 << 10) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  }
  return bytes;
}

// What a convolution reads and writes, as the launch structures have it.
struct DepthwiseMaps {
  const void* x;
  const void* weight;
  const void* bias;
  const float* constant;
  void* y;
  int64_t batch, height, width, channels;
  bool flipped;
};

// Calls f(problem, tile): what a kernel gets, and a value whose type is its tile, of tensor cores or not.
template <class T, bool kMma, class F>
void with_depthwise_tile(const DepthwiseMaps& m, const DepthwiseCut& cut, F f) {
  const DepthwiseProblem<T> problem{static_cast<const T*>(m.x),
                                    static_cast<const T*>(m.weight),
                                    static_cast<const T*>(m.bias),
                                    m.constant,
                                    static_cast<T*>(m.y),
                                    static_cast<int>(m.height),
                                    static_cast<int>(m.width),
                                    static_cast<int>(m.channels),
                                    static_cast<int>(cut.rows),
                                    static_cast<int>(cut.strips),
                                    static_cast<int>(cut.column_tiles),
                                    static_cast<int>(cut.channel_tiles),
                                    m.flipped};
  const auto with = [&](auto split) {
    f(problem, std::conditional_t<kMma, DepthwiseMmaTile<split>, DepthwiseTile<split>>{});
  };
  if (cut.split == 4) return with(std::integral_constant<int, 4>{});
  if (cut.split == 2) return with(std::integral_constant<int, 2>{});
  with(std::integral_constant<int, 1>{});
}

// Calls f(problem, tile, count, cut) for a convolution: `count` is a value whose type is the number of channels that
// are copied at once. 16-bit elements go to the tensor cores where addresses allow it.
template <class F>
void with_depthwise(const DepthwiseMaps& m, DType dtype, F f) {
  with_access(dtype, m.channels, {m.x, m.y}, [&](auto element, auto count) {
    using T = decltype(element);
    constexpr bool kMma = sizeof(T) == 2 && count > 1;
    const DepthwiseCut cut = DepthwiseCut::of(kMma, m.batch, m.height, m.width, m.channels);
    if (m.width * m.channels >= INT32_MAX || m.height >= INT32_MAX - 5 * kMostRows ||
        cut.blocks(m.batch) >= INT32_MAX) {
      throw std::runtime_error("depthwise 7x7 convolution: " + std::to_string(m.height) + " rows of " +
                               std::to_string(m.width * m.channels) + " elements, in " +
                               std::to_string(cut.blocks(m.batch)) +
                               " blocks; each number must stay under 2^31. Split the batch or the channels.");
    }
    with_depthwise_tile<T, kMma>(m, cut, [&](auto problem, auto tile) { f(problem, tile, count, cut); });
  });
}

}  // namespace mra::cuda
