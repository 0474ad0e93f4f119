// Host side of the LayerNorm kernels, for whatever order y's rows have: picks element type and access width, launches.
#pragma once

#include <algorithm>

#include "common/launch_cuda.h"
#include "common/partial_sums.cuh"
#include "common/with_type.h"
#include "cuda/layer_norm.cuh"
#include "cuda/layer_norm.h"

namespace mra::cuda {

// Blocks of the backward kernel: as many as an H200's 132 SMs hold, of at least 4 rows.
inline int layer_norm_blocks(int64_t rows) {
  return static_cast<int>(std::min<int64_t>(132 * kNormBackwardBlocks, (rows + 3) / 4));
}

template <class Order>
void launch_layer_norm(const LayerNormRows& a, Order order) {
  if (a.rows == 0 || a.channels == 0) return;
  const int channels = check_channels("layer_norm", a.channels);
  with_access(a.dtype, a.channels, {a.x, a.weight, a.bias, a.y}, [&](auto element, auto count) {
    using T = decltype(element);
    const int threads = threads_of_row(channels / count, kNormKept<count>), together = kRowThreads / threads;
    const auto blocks = static_cast<unsigned>((a.rows + together - 1) / together);
    MRA_LAUNCH((layer_norm_kernel<T, count, Order>), blocks, dim3(threads, together), 0, a.stream,
               static_cast<const T*>(a.x), static_cast<const T*>(a.weight), static_cast<const T*>(a.bias),
               static_cast<T*>(a.y), a.mean, a.rstd, a.rows, channels, a.eps, order);
  });
}

template <class Order>
void launch_layer_norm_backward(const LayerNormRowsBackward& a, Order order) {
  if (a.channels == 0) return;
  const int channels = check_channels("layer_norm", a.channels), blocks = layer_norm_blocks(a.rows);
  with_access(a.dtype, a.channels, {a.grad_y, a.x, a.weight, a.grad_x}, [&](auto element, auto count) {
    using T = decltype(element);
    if (blocks > 0) {
      const int threads = threads_of_row(channels / count, kNormBackwardKept<count>);
      MRA_LAUNCH((layer_norm_backward_kernel<T, count, Order>), blocks, dim3(threads, kRowThreads / threads), 0,
                 a.stream, static_cast<const T*>(a.grad_y), static_cast<const T*>(a.x), static_cast<const T*>(a.weight),
                 a.mean, a.rstd, static_cast<T*>(a.grad_x), a.partial, a.rows, channels, a.eps, order);
    }
    if (a.grad_weight == nullptr && a.grad_bias == nullptr && a.grad_x_sum == nullptr) return;
    const PartialSums<T, kNormSums> sums{
        a.partial,
        blocks,
        channels,
        {static_cast<T*>(a.grad_weight), static_cast<T*>(a.grad_bias), static_cast<T*>(a.grad_x_sum)}};
    sum_partials(sums, a.stream);
  });
}

}  // namespace mra::cuda
