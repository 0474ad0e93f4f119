// Host side of patch_conv_norm: the convolution, then LayerNorm in its memory; backward is LayerNorm's.
#include <algorithm>
#include <string>

#include "common/launch_cuda.h"
#include "common/with_type.h"
#include "cuda/layer_norm.h"
#include "cuda/patch_conv_norm.cuh"

namespace mra::cuda {
namespace {

void check_sizes(const PatchConvNormForward& a) {
  const int64_t depth = a.planes * a.patch * a.patch;
  if (std::max(std::max(a.height, a.width), std::max(a.channels, depth)) < INT32_MAX / 2) return;
  throw std::runtime_error("patch_conv_norm: pixels of " + std::to_string(a.height) + " x " + std::to_string(a.width) +
                           ", " + std::to_string(depth) + " values a patch and " + std::to_string(a.channels) +
                           " channels; each number must stay under 2^30");
}

}  // namespace

void patch_conv_norm_forward(const PatchConvNormForward& a) {
  const int64_t patches = a.batch * (a.height / a.patch) * (a.width / a.patch);
  if (patches == 0 || a.channels == 0) return;
  check_sizes(a);
  const DeviceGuard guard(a.place.device);
  const auto stream = static_cast<cudaStream_t>(a.place.stream);
  with_access(a.dtype, a.channels, {}, [&](auto element, auto) {
    using T = decltype(element);
    const PatchGrid<T> grid{static_cast<const T*>(a.pixels), static_cast<int>(a.planes), static_cast<int>(a.height),
                            static_cast<int>(a.width), static_cast<int>(a.patch)};
    const int64_t tiles =
        (patches + kConvPatches - 1) / kConvPatches * ((a.channels + kConvChannels - 1) / kConvChannels);
    MRA_LAUNCH((patch_conv_kernel<T>), static_cast<unsigned>(tiles), kConvThreads, 0, stream, grid,
               static_cast<const T*>(a.weight), static_cast<const T*>(a.bias), static_cast<T*>(a.y), patches,
               static_cast<int>(a.channels));
  });
  layer_norm_rows({a.y, a.norm_weight, a.norm_bias, a.y, a.mean, a.rstd, patches, a.channels, a.eps, a.dtype, stream});
}

void patch_conv_norm_backward(const PatchConvNormBackward& a) {
  const DeviceGuard guard(a.place.device);
  layer_norm_rows_backward({a.grad_y, a.conv, a.norm_weight, nullptr, nullptr, a.grad_conv, a.grad_norm_weight,
                            a.grad_norm_bias, a.grad_bias, a.partial, a.rows, a.channels, a.eps, a.dtype,
                            static_cast<cudaStream_t>(a.place.stream)});
}

}  // namespace mra::cuda
