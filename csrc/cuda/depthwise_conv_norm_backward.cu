// Backward of depthwise_conv_norm: convolves again, turns grad_y into the gradient of the convolution's output where
// that lies, and takes it through the convolution. The scratch `partial` serves the sums of both, one after the other.
//
// Bytes: 9 maps of B * H * W * C elements; 6 * 49 FLOPs an element: bound by the multiply-adds of the three
// convolutions.
#include <algorithm>

#include "common/launch_cuda.h"
#include "cuda/depthwise_conv7.h"
#include "cuda/depthwise_weight_gradient.h"
#include "cuda/layer_norm.h"

namespace mra::cuda {

int64_t depthwise_conv_norm_partials(int64_t batch, int64_t height, int64_t width, int64_t channels) {
  return std::max(layer_norm_partials(batch * height * width, channels), depthwise_weight_gradient_partials(channels));
}

void depthwise_conv_norm_backward(const DepthwiseConvNormBackward& a) {
  const DeviceGuard guard(a.place.device);
  const auto stream = static_cast<cudaStream_t>(a.place.stream);
  const int64_t rows = a.batch * a.height * a.width;
  depthwise_conv7({a.x, a.weight, a.bias, nullptr, a.grad_conv, a.batch, a.height, a.width, a.channels,
                   /*flipped=*/false, a.dtype, stream});
  // A bias in front of the norm gets the sum of what comes out of it.
  layer_norm_rows_backward({a.grad_y, a.grad_conv, a.norm_weight, a.mean, a.rstd, a.grad_conv, a.grad_norm_weight,
                            a.grad_norm_bias, a.grad_bias, a.partial, rows, a.channels, /*eps=*/0, a.dtype, stream});
  if (a.grad_x != nullptr) {
    depthwise_conv7({a.grad_conv, a.weight, nullptr, nullptr, a.grad_x, a.batch, a.height, a.width, a.channels,
                     /*flipped=*/true, a.dtype, stream});
  }
  depthwise_weight_gradient(
      {a.grad_conv, a.x, a.grad_weight, nullptr, a.partial, a.batch, a.height, a.width, a.channels, a.dtype, stream});
}

}  // namespace mra::cuda
