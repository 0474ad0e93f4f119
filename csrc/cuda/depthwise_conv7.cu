// Host side of the depthwise 7x7 convolution that writes its output as it is.
#include "cuda/depthwise_conv7.h"
#include "cuda/depthwise_launch.h"

namespace mra::cuda {

void depthwise_conv7(const DepthwiseConv7& a) {
  if (a.batch * a.height * a.width * a.channels == 0) return;
  const DepthwiseMaps maps{a.x, a.weight, a.bias, a.constant, a.y, a.batch, a.height, a.width, a.channels, a.flipped};
  with_depthwise(maps, a.dtype, [&](auto problem, auto tile, auto vector, const DepthwiseCut& cut) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(problem.y)>>;
    using Tile = decltype(tile);
    const auto launch = [&](auto kernel, int bytes) {
      MRA_LAUNCH(kernel, static_cast<unsigned>(cut.blocks(a.batch)), Tile::kThreads, depthwise_memory(kernel, bytes),
                 a.stream, problem);
    };
    if constexpr (Tile::kMma) {
      launch(depthwise_conv7_mma_kernel<T, Tile>, Tile::kElements * sizeof(T));
    } else {
      launch(depthwise_conv7_kernel<T, Tile, kDepthwiseStages, vector>, depthwise_bytes<T, Tile, kDepthwiseStages>());
    }
  });
}

}  // namespace mra::cuda
