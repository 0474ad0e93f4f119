// Host side of patch_conv_norm: a stem's one kernel, or the convolution and LayerNorm in its memory; backward is
// LayerNorm's.
#include <algorithm>
#include <string>

#include "common/launch_cuda.h"
#include "common/with_type.h"
#include "cuda/layer_norm.h"
#include "cuda/patch_conv_norm.cuh"
#include "cuda/patch_conv_norm_mma.cuh"

namespace mra::cuda {
namespace {

void check_sizes(const PatchConvNormForward& a) {
  const int64_t depth = a.planes * a.patch * a.patch;
  if (std::max(std::max(a.height, a.width), std::max(a.channels, depth)) < INT32_MAX / 2) return;
  throw std::runtime_error("patch_conv_norm: pixels of " + std::to_string(a.height) + " x " + std::to_string(a.width) +
                           ", " + std::to_string(depth) + " values a patch and " + std::to_string(a.channels) +
                           " channels; each number must stay under 2^30");
}

template <class T>
PatchGrid<T> grid_of(const PatchConvNormForward& a) {
  return {static_cast<const T*>(a.pixels), static_cast<int>(a.planes), static_cast<int>(a.height),
          static_cast<int>(a.width), static_cast<int>(a.patch)};
}

// Whether the tensor cores' kernel serves it, given that rows of channels allow 16 bytes.
bool is_stem(const PatchConvNormForward& a, int64_t patches) {
  return a.planes == kStemPlanes && a.patch == kStemPatch && a.width % kStemPatch == 0 &&
         reinterpret_cast<uintptr_t>(a.pixels) % 8 == 0 && a.channels % 32 == 0 && a.channels <= kStemChannels &&
         patches < INT32_MAX;
}

template <class T>
void stem(const PatchConvNormForward& a, int64_t patches, cudaStream_t stream) {
  const int across = a.channels <= 96 ? 1 : a.channels <= 192 ? 2 : 4;
  const int64_t tile = kStemWarps / across * 16, tiles = (patches + tile - 1) / tile;
  MRA_LAUNCH((patch_conv_norm_kernel<T>), static_cast<unsigned>(std::min<int64_t>(tiles, kStemBlocks)), kStemWarps * 32,
             a.channels * kStemDepth * sizeof(T), stream, grid_of<T>(a), static_cast<const T*>(a.weight),
             static_cast<const T*>(a.bias), static_cast<const T*>(a.norm_weight), static_cast<const T*>(a.norm_bias),
             static_cast<T*>(a.y), a.mean, a.rstd, static_cast<int>(patches), static_cast<int>(a.channels), across,
             a.eps);
}

template <class T>
void any_patch(const PatchConvNormForward& a, int64_t patches, cudaStream_t stream) {
  const int64_t tiles =
      (patches + kConvPatches - 1) / kConvPatches * ((a.channels + kConvChannels - 1) / kConvChannels);
  MRA_LAUNCH((patch_conv_kernel<T>), static_cast<unsigned>(tiles), kConvThreads, 0, stream, grid_of<T>(a),
             static_cast<const T*>(a.weight), static_cast<const T*>(a.bias), static_cast<T*>(a.y), patches,
             static_cast<int>(a.channels));
  layer_norm_rows({a.y, a.norm_weight, a.norm_bias, a.y, a.mean, a.rstd, patches, a.channels, a.eps, a.dtype, stream});
}

}  // namespace

void patch_conv_norm_forward(const PatchConvNormForward& a) {
  const int64_t patches = a.batch * (a.height / a.patch) * (a.width / a.patch);
  if (patches == 0 || a.channels == 0) return;
  check_sizes(a);
  const DeviceGuard guard(a.place.device);
  const auto stream = static_cast<cudaStream_t>(a.place.stream);
  with_access(a.dtype, a.channels, {a.weight, a.bias, a.norm_weight, a.norm_bias, a.y}, [&](auto element, auto count) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2 && count > 1) {
      if (is_stem(a, patches)) return stem<T>(a, patches, stream);
    }
    any_patch<T>(a, patches, stream);
  });
}

void patch_conv_norm_backward(const PatchConvNormBackward& a) {
  const DeviceGuard guard(a.place.device);
  layer_norm_rows_backward({a.grad_y, a.conv, a.norm_weight, nullptr, nullptr, a.grad_conv, a.grad_norm_weight,
                            a.grad_norm_bias, a.grad_bias, a.partial, a.rows, a.channels, a.eps, a.dtype,
                            static_cast<cudaStream_t>(a.place.stream)});
}

}  // namespace mra::cuda
