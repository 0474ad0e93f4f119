// Host side of the taps' gradient: cuts the work and launches both stages.
#include <algorithm>

#include "common/launch_cuda.h"
#include "cuda/depthwise_weight_gradient.cuh"
#include "cuda/depthwise_weight_gradient.h"
#include "cuda/depthwise_weight_gradient_mma.cuh"

namespace mra::cuda {
namespace {

// The most blocks that share a map, unless its channels alone need more: two for each multiprocessor of the largest
// GPUs.
constexpr int64_t kMaxBlocks = 320;

int64_t blocks_of(int64_t channels) { return (channels + kBlockChannels - 1) / kBlockChannels; }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Cuts a map into columns and rows of work, and launches the first stage; the number of parts that it leaves in
// a.partial: [parts, kSums, C].
template <class T, class Kernel>
int sum_blocks(const DepthwiseWeightGradient& a, Kernel kernel, int threads, int bytes, int block_channels,
               int blocks_each, int tile_rows, int tile_columns) {
  const int64_t strips = (a.width + tile_columns - 1) / tile_columns;
  const int64_t rows = a.batch * strips * ((a.height + tile_rows - 1) / tile_rows);
  if (a.width * a.channels >= INT32_MAX || a.height >= INT32_MAX - kTaps || rows >= INT32_MAX) {
    throw std::runtime_error("depthwise weight gradient: " + std::to_string(a.height) + " rows of " +
                             std::to_string(a.width * a.channels) + " elements, " + std::to_string(rows) +
                             " rows of work; each number must stay under 2^31. Split the batch or the channels.");
  }
  if (rows == 0) return 0;
  const int64_t groups = (a.channels + block_channels - 1) / block_channels;
  const int64_t blocks = std::min<int64_t>(kMaxBlocks, multiprocessors() * blocks_each);
  const int parts = static_cast<int>(std::min(rows, std::max<int64_t>(1, blocks / groups)));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  const WeightGradientMaps maps{static_cast<int>(a.height), static_cast<int>(a.width), static_cast<int>(a.channels),
                                static_cast<int>(strips)};
  MRA_LAUNCH(kernel, dim3(static_cast<unsigned>(groups), parts), threads, bytes, a.stream,
             static_cast<const T*>(a.grad), static_cast<const T*>(a.x), a.partial, maps, static_cast<int>(rows),
             a.grad_bias != nullptr);
  return parts;
}

template <class T, class Tile, bool kWide, int kBlocks>
int sum_by_fma(const DepthwiseWeightGradient& a) {
  constexpr int kBytes = std::max<int>(Tile::kSlots * Tile::kSlot * sizeof(T), Tile::kExchange * sizeof(float));
  return sum_blocks<T>(a, depthwise_weight_gradient_kernel<T, Tile, kWide, kBlocks>, Tile::kThreads, kBytes,
                       kBlockChannels, kBlocks, 1, Tile::kColumns);
}

template <class T, class Tile, bool kWide>
int sum_by_mma(const DepthwiseWeightGradient& a) {
  constexpr int kBytes =
      std::max<int>(Tile::kStages * Tile::kStage * sizeof(T), Tile::kThreads / 32 * Tile::kProducts * sizeof(float));
  return sum_blocks<T>(a, depthwise_weight_gradient_mma_kernel<T, Tile, kWide>, Tile::kThreads, kBytes, Tile::kChannels,
                       1, Tile::kRows, Tile::kColumns);
}

// Of 16-bit elements: the tensor cores. Tiles below are of the float32 units.
constexpr int kMma = 3;

template <class T>
void run(const DepthwiseWeightGradient& a, int tile) {
  const bool wide = aligned(a.grad) && aligned(a.x) && a.channels * sizeof(T) % 16 == 0;
  const auto parts = [&] {
    if constexpr (sizeof(T) == 2) {
      if (!wide) return sum_by_mma<T, WeightGradientMmaTile<4, 1, 6>, false>(a);
      if (tile == kMma || tile < 0) return sum_by_mma<T, WeightGradientMmaTile<4, 1, 6>, true>(a);
    }
    if (!wide) return sum_by_fma<T, WeightGradientTile<4, 4>, false, 2>(a);
    if (tile == 1) return sum_by_fma<T, WeightGradientTile<8, 4>, true, 1>(a);
    if (tile == 2) return sum_by_fma<T, WeightGradientTile<4, 2>, true, 3>(a);
    return sum_by_fma<T, WeightGradientTile<4, 4>, true, 2>(a);
  }();
  const dim3 grid(static_cast<unsigned>((a.channels + kSliceChannels - 1) / kSliceChannels), kSums);
  MRA_LAUNCH(depthwise_weight_gradient_sum_kernel<T>, grid, dim3(kSliceChannels, kSlices), 0, a.stream, a.partial,
             static_cast<T*>(a.grad_weight), static_cast<T*>(a.grad_bias), parts, static_cast<int>(a.channels));
}

}  // namespace

int64_t depthwise_weight_gradient_partials(int64_t channels) {
  return std::max(kMaxBlocks / std::max<int64_t>(1, blocks_of(channels)), int64_t{1}) * kSums * channels;
}

void depthwise_weight_gradient(const DepthwiseWeightGradient& a, int tile) {
  if (a.channels == 0 || (a.grad_weight == nullptr && a.grad_bias == nullptr)) return;
  switch (a.dtype) {
    case DType::kFloat32:
      return run<float>(a, tile);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(a, tile);
    case DType::kFloat16:
      return run<__half>(a, tile);
  }
}

}  // namespace mra::cuda
