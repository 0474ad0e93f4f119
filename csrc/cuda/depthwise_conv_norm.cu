// Host side of depthwise_conv_norm forward: the convolution, then LayerNorm in its memory.
//
// The second pass reads and writes the map once more: at B=1 from the L2 (60 MB of an H200), where stage 1's 25 MB of
// bfloat16 fit twice.
#include "common/launch_cuda.h"
#include "cuda/depthwise_conv7.h"
#include "cuda/layer_norm.h"

namespace mra::cuda {

void depthwise_conv_norm_forward(const DepthwiseConvNormForward& a) {
  if (a.batch * a.height * a.width * a.channels == 0) return;
  const DeviceGuard guard(a.place.device);
  const auto stream = static_cast<cudaStream_t>(a.place.stream);
  depthwise_conv7({a.x, a.weight, a.bias, nullptr, a.y, a.batch, a.height, a.width, a.channels, /*flipped=*/false,
                   a.dtype, stream});
  layer_norm_rows({a.y, a.norm_weight, a.norm_bias, a.y, a.mean, a.rstd, a.batch * a.height * a.width, a.channels,
                   a.eps, a.dtype, stream});
}

}  // namespace mra::cuda
