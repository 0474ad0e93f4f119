// How the high-resolution grid maps onto the low one: the same arithmetic for the CPU and the GPU.
#pragma once

#include <cstdint>

// Internal linkage: the CPU kernels compile this once per instruction set, and the linker must not merge the builds.
#if defined(__CUDACC__)
#define MRA_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define MRA_HOST_DEVICE static inline
#endif

namespace mra {

// Position `target` of an axis of `size` points reads `first` and `second` of an axis of `source` points, aligned at
// the corners: value = (1 - fraction) * first + fraction * second. An axis has fewer than 2^31 points.
struct Bilinear {
  int first, second;
  float fraction;
};

MRA_HOST_DEVICE float bilinear_scale(int source, int size) {
  return size > 1 ? static_cast<float>(source - 1) / static_cast<float>(size - 1) : 0.0f;
}

MRA_HOST_DEVICE Bilinear bilinear(int target, int source, float scale) {
  const float position = static_cast<float>(target) * scale;
  int first = static_cast<int>(position);
  if (first > source - 1) first = source - 1;
  return {first, first + (first < source - 1 ? 1 : 0), position - static_cast<float>(first)};
}

// The targets that read `index` lie in [begin, end): positions strictly within one source step of it, and one more on
// each side against rounding; `bilinear` decides.
struct Range {
  int begin, end;
};

MRA_HOST_DEVICE Range bilinear_readers(int index, int size, float scale) {
  if (scale == 0.0f) return {0, size};
  const int begin = static_cast<int>(static_cast<float>(index - 1) / scale) - 1;
  const int end = static_cast<int>(static_cast<float>(index + 1) / scale) + 2;
  return {begin < 0 ? 0 : begin, end > size ? size : end};
}

// The weight with which a target reads `index`; 0 if it does not.
MRA_HOST_DEVICE float bilinear_weight(const Bilinear& b, int index) {
  return (b.first == index ? 1.0f - b.fraction : 0.0f) + (b.second == index ? b.fraction : 0.0f);
}

}  // namespace mra
