// Host side of depthwise_conv_gelu forward: one pass over the map, then the second stage of both means.
#include "common/partial_sums.cuh"
#include "cuda/depthwise_conv_gelu.cuh"
#include "cuda/depthwise_launch.h"

namespace mra::cuda {

int64_t depthwise_conv_gelu_sums(int64_t batch, int64_t height, int64_t width, int64_t channels) {
  const auto parts = [&](bool mma) { return DepthwiseCut::of(mma, batch, height, width, channels).parts; };
  return batch * std::max(parts(false), parts(true)) * 2 * channels;
}

void depthwise_conv_gelu_forward(const DepthwiseConvGeluForward& a) {
  if (a.batch * a.height * a.width * a.channels == 0) return;
  const DeviceGuard guard(a.place.device);
  const auto stream = static_cast<cudaStream_t>(a.place.stream);
  const float share = 1.0f / static_cast<float>(a.height * a.width);
  const DepthwiseMaps maps{a.x,     a.weight, a.bias,  nullptr,    a.y,
                           a.batch, a.height, a.width, a.channels, /*flipped=*/false};
  with_depthwise(maps, a.dtype, [&](auto problem, auto tile, auto vector, const DepthwiseCut& cut) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(problem.y)>>;
    using Tile = decltype(tile);
    const auto launch = [&](auto kernel, int bytes) {
      MRA_LAUNCH(kernel, static_cast<unsigned>(cut.blocks(a.batch)), Tile::kThreads, depthwise_memory(kernel, bytes),
                 stream, problem, a.partial, share);
    };
    if constexpr (Tile::kMma) {
      launch(depthwise_conv_gelu_mma_kernel<T, Tile>, Tile::kElements * sizeof(T));
    } else {
      launch(depthwise_conv_gelu_kernel<T, Tile, kDepthwiseStages, vector>,
             depthwise_bytes<T, Tile, kDepthwiseStages>());
    }
    const PartialSums<float, 2> sums{
        a.partial, static_cast<int>(cut.parts), static_cast<int>(a.channels), {a.y_mean, a.x_mean}, a.batch};
    sum_partials(sums, stream);
  });
}

}  // namespace mra::cuda
