// Host side of linear_gelu: picks element type and access width, then launches.
#include "common/with_type.h"
#include "cuda/linear_gelu.cuh"

namespace mra::cuda {
namespace {

constexpr dim3 kBlock(kColumns, kColumnRows);

// Pictures where each has a mean, otherwise one group of all rows.
Runs runs_of(bool mean, int64_t batch, int64_t positions, int64_t channels) {
  return mean ? Runs::of(batch, positions, channels) : Runs::of(1, batch * positions, channels);
}

}  // namespace

int64_t linear_gelu_partials(int64_t groups, int64_t rows, int64_t channels) {
  return std::max<int64_t>(groups, 1) * Runs::of(groups, rows, channels).runs * channels;
}

void linear_gelu_forward(const LinearGeluForward& a) {
  if (a.batch == 0 || a.channels == 0) return;
  const DeviceGuard guard(a.place.device);
  const auto stream = static_cast<cudaStream_t>(a.place.stream);
  const int channels = check_channels("linear_gelu", a.channels);
  const bool mean = a.mean_weights != nullptr && a.y_mean != nullptr;
  const Runs runs = runs_of(mean, a.batch, a.positions, a.channels);
  with_access(a.dtype, a.channels, {a.product, a.y}, [&](auto element, auto count) {
    using T = decltype(element);
    MRA_LAUNCH((linear_gelu_kernel<T, count>), runs.blocks(channels / count), kBlock, 0, stream,
               static_cast<const T*>(a.product), static_cast<T*>(a.y), a.mean_weights, mean ? a.partial : nullptr,
               channels, runs);
  });
  if (mean) sum_partials(PartialSums<float, 1>{a.partial, runs.runs, channels, {a.y_mean}, a.batch}, stream);
}

void linear_gelu_backward(const LinearGeluBackward& a) {
  if (a.channels == 0) return;
  const DeviceGuard guard(a.place.device);
  const auto stream = static_cast<cudaStream_t>(a.place.stream);
  const int channels = check_channels("linear_gelu", a.channels);
  const Runs runs = runs_of(a.grad_y_mean != nullptr, a.batch, a.positions, a.channels);
  with_access(a.dtype, a.channels, {a.grad_y, a.grad_y_mean, a.product, a.grad_product}, [&](auto element, auto count) {
    using T = decltype(element);
    MRA_LAUNCH((linear_gelu_backward_kernel<T, count>), runs.blocks(channels / count), kBlock, 0, stream,
               static_cast<const T*>(a.grad_y), a.grad_y_mean, static_cast<const T*>(a.product), a.mean_weights,
               static_cast<T*>(a.grad_product), a.grad_bias != nullptr ? a.partial : nullptr, channels, runs);
    if (a.grad_bias == nullptr) return;
    const int parts = static_cast<int>(runs.groups * runs.runs);
    sum_partials(PartialSums<T, 1>{a.partial, parts, channels, {static_cast<T*>(a.grad_bias)}}, stream);
  });
}

}  // namespace mra::cuda
