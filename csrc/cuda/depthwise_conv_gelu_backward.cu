// Backward of depthwise_conv_gelu: convolves again, turns that into the gradient of the convolution's output, and takes
// it through the convolution. The scratch `partial` serves the input's mean first, then the taps' sums.
#include <algorithm>

#include "common/launch_cuda.h"
#include "common/with_type.h"
#include "cuda/depthwise_conv7.h"
#include "cuda/depthwise_conv_gelu_backward.cuh"
#include "cuda/depthwise_weight_gradient.h"

namespace mra::cuda {
namespace {

constexpr int kMaxGridY = 65535;

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>((threads + kGeluThreads - 1) / kGeluThreads); }

// From the convolution's output to its gradient, in a.grad_conv.
void through_gelu(const DepthwiseConvGeluBackward& a, float share, cudaStream_t stream) {
  const int64_t rows = a.batch * a.height;
  if (a.width * a.channels >= INT32_MAX || rows >= INT32_MAX) {
    throw std::runtime_error("depthwise_conv_gelu: " + std::to_string(rows) + " rows of " +
                             std::to_string(a.width * a.channels) +
                             " elements; each number must stay under 2^31. Split the batch or the channels.");
  }
  with_access(a.dtype, a.channels, {a.grad_y, a.grad_conv}, [&](auto element, auto count) {
    using T = decltype(element);
    const int vectors = static_cast<int>(a.channels / count);
    const dim3 grid(blocks_of(a.width * vectors), static_cast<unsigned>(std::min<int64_t>(rows, kMaxGridY)));
    MRA_LAUNCH((gelu_gradient_kernel<T, count>), grid, kGeluThreads, 0, stream, static_cast<const T*>(a.grad_y),
               a.grad_y_mean, static_cast<T*>(a.grad_conv), share, static_cast<int>(rows), static_cast<int>(a.height),
               static_cast<int>(a.width), vectors);
  });
}

}  // namespace

int64_t depthwise_conv_gelu_partials(int64_t batch, int64_t channels) {
  return std::max(batch * channels, depthwise_weight_gradient_partials(channels));
}

void depthwise_conv_gelu_backward(const DepthwiseConvGeluBackward& a) {
  const DeviceGuard guard(a.place.device);
  const auto stream = static_cast<cudaStream_t>(a.place.stream);
  if (a.batch * a.height * a.width * a.channels > 0) {
    const float share = 1.0f / static_cast<float>(a.height * a.width);
    depthwise_conv7({a.x, a.weight, a.bias, nullptr, a.grad_conv, a.batch, a.height, a.width, a.channels,
                     /*flipped=*/false, a.dtype, stream});
    through_gelu(a, share, stream);
    if (a.grad_x != nullptr) {
      float* constant = a.grad_x_mean == nullptr ? nullptr : a.partial;
      if (constant != nullptr) {
        const int64_t count = a.batch * a.channels;
        MRA_LAUNCH(mean_gradient_kernel, blocks_of(count), kGeluThreads, 0, stream, a.grad_x_mean, constant, share,
                   count);
      }
      depthwise_conv7({a.grad_conv, a.weight, nullptr, constant, a.grad_x, a.batch, a.height, a.width, a.channels,
                       /*flipped=*/true, a.dtype, stream});
    }
  }
  depthwise_weight_gradient({a.grad_conv, a.x, a.grad_weight, a.grad_bias, a.partial, a.batch, a.height, a.width,
                             a.channels, a.dtype, stream});
}

}  // namespace mra::cuda
