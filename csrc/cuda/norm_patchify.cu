// Host side of norm_patchify: LayerNorm's kernels in the order of patch rows.
#include "cuda/layer_norm_launch.h"
#include "cuda/norm_patchify.cuh"

namespace mra::cuda {
namespace {

template <class Arguments>
PatchOrder order_of(const Arguments& a) {
  if (a.height >= INT32_MAX || a.width >= INT32_MAX) {
    throw std::runtime_error("norm_patchify: a map of " + std::to_string(a.height) + " x " + std::to_string(a.width) +
                             " pixels; each number must stay under 2^31");
  }
  return {static_cast<uint32_t>(a.height), static_cast<uint32_t>(a.width)};
}

}  // namespace

void norm_patchify_forward(const NormPatchifyForward& a) {
  const DeviceGuard guard(a.place.device);
  launch_layer_norm({a.x, a.norm_weight, a.norm_bias, a.y, a.mean, a.rstd, a.batch * a.height * a.width, a.channels,
                     a.eps, a.dtype, static_cast<cudaStream_t>(a.place.stream)},
                    order_of(a));
}

void norm_patchify_backward(const NormPatchifyBackward& a) {
  const DeviceGuard guard(a.place.device);
  launch_layer_norm_backward(
      {a.grad_y, a.x, a.norm_weight, a.mean, a.rstd, a.grad_x, a.grad_norm_weight, a.grad_norm_bias, nullptr, a.partial,
       a.batch * a.height * a.width, a.channels, 0.0f, a.dtype, static_cast<cudaStream_t>(a.place.stream)},
      order_of(a));
}

}  // namespace mra::cuda
