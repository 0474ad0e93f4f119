// Host side of linear_scale_residual: picks element type and access width, then launches.
#include "common/with_type.h"
#include "cuda/linear_scale_residual.cuh"

namespace mra::cuda {
namespace {

constexpr dim3 kBlock(kColumns, kColumnRows);

}  // namespace

int64_t linear_scale_residual_partials(int64_t rows, int64_t channels) {
  return 2 * Runs::of(1, rows, channels).runs * channels;
}

void linear_scale_residual_forward(const LinearScaleResidualForward& a) {
  if (a.rows == 0 || a.channels == 0) return;
  const DeviceGuard guard(a.place.device);
  const auto stream = static_cast<cudaStream_t>(a.place.stream);
  const int channels = check_channels("linear_scale_residual", a.channels);
  const Runs runs = Runs::of(1, a.rows, a.channels);
  with_access(a.dtype, a.channels, {a.product, a.scale, a.residual, a.y}, [&](auto element, auto count) {
    using T = decltype(element);
    MRA_LAUNCH((linear_scale_residual_kernel<T, count>), runs.blocks(channels / count), kBlock, 0, stream,
               static_cast<const T*>(a.product), static_cast<const T*>(a.scale), static_cast<const T*>(a.residual),
               static_cast<T*>(a.y), channels, runs);
  });
}

void linear_scale_residual_backward(const LinearScaleResidualBackward& a) {
  if (a.channels == 0) return;
  const DeviceGuard guard(a.place.device);
  const auto stream = static_cast<cudaStream_t>(a.place.stream);
  const int channels = check_channels("linear_scale_residual", a.channels);
  const Runs runs = Runs::of(1, a.rows, a.channels);
  const bool sums = a.grad_bias != nullptr || a.grad_scale != nullptr;
  with_access(a.dtype, a.channels, {a.grad_y, a.scale, a.product, a.grad_product}, [&](auto element, auto count) {
    using T = decltype(element);
    MRA_LAUNCH((linear_scale_residual_backward_kernel<T, count>), runs.blocks(channels / count), kBlock, 0, stream,
               static_cast<const T*>(a.grad_y), static_cast<const T*>(a.scale), static_cast<const T*>(a.product),
               static_cast<T*>(a.grad_product), sums ? a.partial : nullptr, channels, runs);
    if (!sums) return;
    const PartialSums<T, 2> second{
        a.partial, runs.runs, channels, {static_cast<T*>(a.grad_bias), static_cast<T*>(a.grad_scale)}};
    sum_partials(second, stream);
  });
}

}  // namespace mra::cuda
