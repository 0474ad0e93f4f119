// LayerNorm over the channels of one pixel, forward and backward; statistics in float32, in two passes.
#pragma once

#include "cpu/vector.h"

namespace mra::cpu::MRA_ISA {

struct Statistics {
  float mean, rstd;
};

// Vectors of a pixel are `step` apart, which is kLanes in a map, and pixels are `stride` apart, which is C there.

// The statistics of kPixels pixels. Several at once, because the sums of one wait for each other.
template <int kPixels, class T>
inline void statistics(const T* values, int64_t stride, int64_t step, int64_t channels, float eps, Statistics* result) {
  Floats totals[kPixels] = {}, squares[kPixels] = {};
  float means[kPixels];
  for_each_vector(channels, [&](int64_t c, int64_t lanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) totals[i] += load_first(values + i * stride + c / kLanes * step, lanes);
  });
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) means[i] = sum(totals[i]) / channels;
  for_each_vector(channels, [&](int64_t c, int64_t lanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) {
      Floats d = load_first(values + i * stride + c / kLanes * step, lanes) - means[i];
      for (int64_t lane = lanes; lane < kLanes; ++lane) d[lane] = 0;
      squares[i] += d * d;
    }
  });
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) {
    result[i] = {means[i], 1.0f / __builtin_sqrtf(sum(squares[i]) / channels + eps)};
  }
}

// `count` pixels' statistics.
template <class T>
inline void row_statistics(const T* values, int64_t count, int64_t stride, int64_t step, int64_t channels, float eps,
                           Statistics* result) {
  constexpr int64_t kTogether = 4;
  const int64_t whole = count / kTogether * kTogether;
  for (int64_t i = 0; i < whole; i += kTogether)
    statistics<kTogether>(values + i * stride, stride, step, channels, eps, result + i);
  for (int64_t i = whole; i < count; ++i) statistics<1>(values + i * stride, stride, step, channels, eps, result + i);
}

inline Floats normalize(Floats values, const Statistics& s, Floats scale, Floats shift) {
  return (values - s.mean) * s.rstd * scale + shift;
}

// values: [C]; scale and shift: [padded] -> y: [C], by streams where they are worth it.
template <class T, class Out>
inline void normalize(const T* values, int64_t step, const Statistics& s, const float* scale, const float* shift,
                      int64_t channels, bool streams, Out* y) {
  const auto result = [&](int64_t c, int64_t lanes) {
    return normalize(load_first(values + c / kLanes * step, lanes), s, load(scale + c), load(shift + c));
  };
  if (streams) {
    for (int64_t c = 0; c < channels; c += kLanes) stream(y + c, result(c, kLanes));
  } else {
    for_each_vector(channels, [&](int64_t c, int64_t lanes) { store_first(y + c, result(c, lanes), lanes); });
  }
}

// What backward sums over pixels, each [padded]: gradients of the norm's weight and bias, and of what was added to the
// values before the norm, a convolution's bias (null for none).
struct NormSums {
  float *weight, *bias, *input;

  static constexpr int64_t kRows = 3;
  static NormSums at(float* p, int64_t padded) { return {p, p + padded, p + 2 * padded}; }
};

// The gradient of a pixel's values from grad_y: [C]. Both may be read and `grad` written in one memory, or streamed.
template <class T, class Value>
inline void normalize_backward(const T* grad_y, const Value* values, int64_t step, const Statistics& s,
                               const float* scale, int64_t channels, const NormSums& sums, bool streams, T* grad) {
  Floats total = {}, projected = {};
  for_each_vector(channels, [&](int64_t c, int64_t lanes) {
    const Floats g = load_first(grad_y + c, lanes), scaled = g * load(scale + c);
    const Floats normal = (load_first(values + c / kLanes * step, lanes) - s.mean) * s.rstd;
    store(sums.weight + c, load(sums.weight + c) + g * normal);
    store(sums.bias + c, load(sums.bias + c) + g);
    total += scaled;
    projected += scaled * normal;
  });
  const float average = sum(total) / channels, slope = sum(projected) / channels;
  for_each_vector(channels, [&](int64_t c, int64_t lanes) {
    const Floats g = load_first(grad_y + c, lanes) * load(scale + c);
    const Floats normal = (load_first(values + c / kLanes * step, lanes) - s.mean) * s.rstd;
    const Floats d = (g - average - normal * slope) * s.rstd;
    if (sums.input != nullptr) store(sums.input + c, load(sums.input + c) + d);
    if (streams) {
      stream(grad + c, d);
    } else {
      store_first(grad + c, d, lanes);
    }
  });
}

}  // namespace mra::cpu::MRA_ISA
