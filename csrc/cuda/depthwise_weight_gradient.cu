// Host side of the taps' gradient: cuts the work and launches both stages.
#include <algorithm>

#include "cuda/depthwise_launch.h"
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

// How many parts `units` of work are cut into, where as many blocks as `blocks_each` fit on a multiprocessor.
int parts_of(const DepthwiseWeightGradient& a, int64_t units, int block_channels, int blocks_each) {
  if (a.width * a.channels >= INT32_MAX || a.height >= INT32_MAX - 5 * kMostRows || units >= INT32_MAX) {
    throw std::runtime_error("depthwise weight gradient: " + std::to_string(a.height) + " rows of " +
                             std::to_string(a.width * a.channels) + " elements, " + std::to_string(units) +
                             " units of work; each number must stay under 2^31. Split the batch or the channels.");
  }
  const int64_t groups = (a.channels + block_channels - 1) / block_channels;
  const int64_t blocks = std::min<int64_t>(kMaxBlocks, multiprocessors() * blocks_each);
  return static_cast<int>(std::min(units, std::max<int64_t>(1, blocks / groups)));
}

// The first stage on the float32 units; the number of parts that it leaves in a.partial: [parts, kSums, C].
template <class T, bool kWide>
int sum_by_fma(const DepthwiseWeightGradient& a) {
  using Tile = WeightGradientTile<4, 4>;
  constexpr int kBlocks = 2;
  constexpr int kBytes = std::max<int>(Tile::kSlots * Tile::kSlot * sizeof(T), Tile::kExchange * sizeof(float));
  const int64_t strips = (a.width + Tile::kColumns - 1) / Tile::kColumns, rows = a.batch * strips * a.height;
  const int parts = parts_of(a, rows, kBlockChannels, kBlocks);
  if (parts == 0) return 0;
  const WeightGradientMaps maps{static_cast<int>(a.height), static_cast<int>(a.width), static_cast<int>(a.channels),
                                static_cast<int>(strips)};
  const dim3 grid(static_cast<unsigned>(blocks_of(a.channels)), parts);
  const auto kernel = depthwise_weight_gradient_kernel<T, Tile, kWide, kBlocks>;
  MRA_LAUNCH(kernel, grid, Tile::kThreads, depthwise_memory(kernel, kBytes), a.stream, static_cast<const T*>(a.grad),
             static_cast<const T*>(a.x), a.partial, maps, static_cast<int>(rows), a.grad_bias != nullptr);
  return parts;
}

// The first stage on tensor cores.
template <class T>
int sum_by_mma(const DepthwiseWeightGradient& a) {
  const DepthwiseMaps maps{a.x, nullptr, nullptr, nullptr, nullptr, a.batch, a.height, a.width, a.channels, false};
  const DepthwiseCut cut = DepthwiseCut::of(/*mma=*/true, a.batch, a.height, a.width, a.channels);
  const int64_t units = a.batch * cut.strips * cut.column_tiles;
  const int parts = parts_of(a, units, DepthwiseMmaTile<1>::kChannels, kMmaBlocks);
  if (parts == 0) return 0;
  with_depthwise_tile<T, /*kMma=*/true>(maps, cut, [&](auto problem, auto tile) {
    using Tile = decltype(tile);
    const dim3 grid(static_cast<unsigned>(cut.channel_tiles), parts);
    const auto kernel = depthwise_weight_gradient_mma_kernel<T, Tile>;
    MRA_LAUNCH(kernel, grid, Tile::kThreads, depthwise_memory(kernel, weight_gradient_mma_bytes<T, Tile>()), a.stream,
               problem, static_cast<const T*>(a.grad), a.partial, static_cast<int>(units));
  });
  return parts;
}

template <class T>
void run(const DepthwiseWeightGradient& a) {
  const bool wide = aligned(a.grad) && aligned(a.x) && a.channels * sizeof(T) % 16 == 0;
  const int parts = [&] {
    if (!wide) return sum_by_fma<T, false>(a);
    if constexpr (sizeof(T) == 2) {
      return sum_by_mma<T>(a);
    } else {
      return sum_by_fma<T, true>(a);
    }
  }();
  const dim3 grid(static_cast<unsigned>((a.channels + kSliceChannels - 1) / kSliceChannels), kSums);
  MRA_LAUNCH(depthwise_weight_gradient_sum_kernel<T>, grid, dim3(kSliceChannels, kSlices), 0, a.stream, a.partial,
             static_cast<T*>(a.grad_weight), static_cast<T*>(a.grad_bias), parts, static_cast<int>(a.channels));
}

}  // namespace

int64_t depthwise_weight_gradient_partials(int64_t channels) {
  return std::max(kMaxBlocks / std::max<int64_t>(1, blocks_of(channels)), int64_t{1}) * kSums * channels;
}

void depthwise_weight_gradient(const DepthwiseWeightGradient& a) {
  if (a.channels == 0 || (a.grad_weight == nullptr && a.grad_bias == nullptr)) return;
  switch (a.dtype) {
    case DType::kFloat32:
      return run<float>(a);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(a);
    case DType::kFloat16:
      return run<__half>(a);
  }
}

}  // namespace mra::cuda
