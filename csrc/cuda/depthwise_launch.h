// How a depthwise convolution is cut into blocks, and from a dtype and addresses to the kernel of that cut.
#pragma once

#include <algorithm>

#include "common/launch_cuda.h"
#include "common/with_type.h"
#include "cuda/depthwise_conv7.cuh"

namespace mra::cuda {

// Rows in flight in a block's ring.
constexpr int kDepthwiseStages = 4;

// The blocks that are resident on an H200. Cuts follow from the sizes alone, so that sums are the same on every device.
constexpr int64_t kDepthwiseSlots = 132 * kDepthwiseBlocks;

struct DepthwiseCut {
  int groups;    // of columns in a block: 1, 2 or 4
  int64_t rows;  // of a strip
  int64_t strips, column_tiles, channel_tiles;

  int64_t blocks(int64_t batch) const { return batch * strips * column_tiles * channel_tiles; }
  // Parts of a picture whose sums are written apart: each group of columns has its own.
  int64_t parts() const { return strips * column_tiles * groups; }

  // The cut with the least time by a simple count: waves of blocks, each as long as its rows and what starting costs.
  static DepthwiseCut of(int64_t batch, int64_t height, int64_t width, int64_t channels) {
    // Halo rows, taps and the first rows' latency, in rows of work.
    constexpr int64_t kStart = 4, kMostRows = 64;
    DepthwiseCut best{};
    int64_t least = INT64_MAX;
    for (const int groups : {4, 2, 1}) {
      const int64_t columns = groups * kOutputs, lanes = kDepthwiseThreads / groups;
      DepthwiseCut cut{groups, 0, 0, (width + columns - 1) / columns, (channels + lanes - 1) / lanes};
      for (cut.rows = 1; cut.rows <= std::min(height, kMostRows); ++cut.rows) {
        cut.strips = (height + cut.rows - 1) / cut.rows;
        const int64_t waves = (cut.blocks(batch) + kDepthwiseSlots - 1) / kDepthwiseSlots;
        const int64_t time = waves * (cut.rows + kStart);
        if (time >= least) continue;
        least = time;
        best = cut;
      }
    }
    return best;
  }
};

// Lets a kernel have the shared memory that its tile needs; the bytes.
template <class T, class Tile, class Kernel>
int depthwise_memory(Kernel kernel) {
  constexpr int kBytes = depthwise_bytes<T, Tile, kDepthwiseStages>();
  if (kBytes > 48 << 10) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "cudaFuncSetAttribute");
  }
  return kBytes;
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

// Calls f(problem, tile, wide): what the kernel gets, and values whose types are its tile and whether channels are
// copied 16 bytes at a time.
template <class F>
void with_depthwise(const DepthwiseMaps& m, const DepthwiseCut& cut, DType dtype, F f) {
  if (m.width * m.channels >= INT32_MAX || m.height >= INT32_MAX - kTaps || cut.blocks(m.batch) >= INT32_MAX) {
    throw std::runtime_error("depthwise 7x7 convolution: " + std::to_string(m.height) + " rows of " +
                             std::to_string(m.width * m.channels) + " elements, in " +
                             std::to_string(cut.blocks(m.batch)) +
                             " blocks; each number must stay under 2^31. Split the batch or the channels.");
  }
  with_access(dtype, m.channels, {m.x}, [&](auto element, auto count) {
    using T = decltype(element);
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
    if (cut.groups == 4) return f(problem, DepthwiseTile<4>{}, count);
    if (cut.groups == 2) return f(problem, DepthwiseTile<2>{}, count);
    f(problem, DepthwiseTile<1>{}, count);
  });
}

}  // namespace mra::cuda
