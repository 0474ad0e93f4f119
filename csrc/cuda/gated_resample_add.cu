// Host side of gated_resample_add: picks element type, mode and access width, then launches.
#include <algorithm>
#include <type_traits>

#include "common/launch_cuda.h"
#include "cuda/gated_resample_add.cuh"

namespace mra::cuda {
namespace {

constexpr int kMaxGridY = 65535;

int to_int(int64_t size) { return static_cast<int>(size); }

// After check_sizes, everything but an offset fits 32 bits.
template <class T, class Arguments>
High<T> high_of(const Arguments& a) {
  const int low_height = to_int(a.height), low_width = to_int(a.width);
  const int height = to_int(a.high_height), width = to_int(a.high_width);
  return {static_cast<const T*>(a.high),
          height,
          width,
          to_int(a.channels),
          height / low_height,
          width / low_width,
          bilinear_scale(height, low_height),
          bilinear_scale(width, low_width)};
}

template <class Arguments>
Mode mode_of(const Arguments& a) {
  if (a.high_height == a.height && a.high_width == a.width) return Mode::kSame;
  return a.high_height % a.height == 0 && a.high_width % a.width == 0 ? Mode::kPool : Mode::kBilinear;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A row's elements and the number of rows must fit 32 bits; the map as a whole need not.
template <class Arguments>
void check_sizes(const Arguments& a) {
  const int64_t row = std::max(a.width, a.high_width) * a.channels;
  const int64_t rows = a.batch * std::max(a.height, a.high_height);
  if (row >= INT32_MAX || rows >= INT32_MAX) {
    throw std::runtime_error("gated_resample_add: " + std::to_string(rows) + " rows of " + std::to_string(row) +
                             " elements; each number must stay under 2^31. Split the batch or the channels.");
  }
}

dim3 grid_of(int rows, int64_t width, int vectors) {
  return dim3(static_cast<unsigned>((width * vectors + kThreads - 1) / kThreads), std::min(rows, kMaxGridY));
}

template <class T, Mode kMode, int kCount>
void forward(const GatedResampleAddForward& a) {
  const int vectors = to_int(a.channels / kCount), rows = to_int(a.batch * a.height);
  MRA_LAUNCH((gated_resample_add_kernel<T, kMode, kCount>), grid_of(rows, a.width, vectors), kThreads, 0,
             static_cast<cudaStream_t>(a.place.stream), static_cast<const T*>(a.low), high_of<T>(a), a.gate,
             static_cast<T*>(a.y), rows, to_int(a.height), to_int(a.width), vectors);
}

template <class T, Mode kMode, int kCount>
void backward(const GatedResampleAddBackward& a) {
  const int vectors = to_int(a.channels / kCount);
  const auto stream = static_cast<cudaStream_t>(a.place.stream);
  const T* grad_y = static_cast<const T*>(a.grad_y);
  const High<T> high = high_of<T>(a);
  if (a.grad_high != nullptr) {
    const int rows = to_int(a.batch * a.high_height);
    MRA_LAUNCH((gated_resample_add_high_gradient_kernel<T, kMode, kCount>), grid_of(rows, a.high_width, vectors),
               kThreads, 0, stream, grad_y, high, a.gate, static_cast<T*>(a.grad_high), rows, to_int(a.height),
               to_int(a.width), vectors);
  }
  if (a.grad_gate != nullptr) {
    MRA_LAUNCH((gated_resample_add_gate_partial_kernel<T, kMode, kCount>), static_cast<unsigned>(a.batch * a.height),
               kThreads, 0, stream, grad_y, high, a.partial, to_int(a.height), to_int(a.width), vectors);
    MRA_LAUNCH(gated_resample_add_gate_kernel<kThreads>, static_cast<unsigned>(a.batch), kThreads, 0, stream, a.partial,
               a.grad_gate, a.height);
  }
}

// Calls f(element, mode, count): values whose types carry what the arguments ask for.
template <class T, class F>
void with_mode(Mode mode, bool wide, F f) {
  constexpr int kWide = 16 / sizeof(T);
  switch (mode) {
    case Mode::kSame:
      return wide ? f(T{}, std::integral_constant<Mode, Mode::kSame>{}, std::integral_constant<int, kWide>{})
                  : f(T{}, std::integral_constant<Mode, Mode::kSame>{}, std::integral_constant<int, 1>{});
    case Mode::kPool:
      return wide ? f(T{}, std::integral_constant<Mode, Mode::kPool>{}, std::integral_constant<int, kWide>{})
                  : f(T{}, std::integral_constant<Mode, Mode::kPool>{}, std::integral_constant<int, 1>{});
    case Mode::kBilinear:
      return wide ? f(T{}, std::integral_constant<Mode, Mode::kBilinear>{}, std::integral_constant<int, kWide>{})
                  : f(T{}, std::integral_constant<Mode, Mode::kBilinear>{}, std::integral_constant<int, 1>{});
  }
}

template <class F>
void with_type(DType dtype, Mode mode, int64_t channels, bool addresses_aligned, F f) {
  const auto wide = [&](int64_t size) { return addresses_aligned && channels * size % 16 == 0; };
  switch (dtype) {
    case DType::kFloat32:
      return with_mode<float>(mode, wide(4), f);
    case DType::kBFloat16:
      return with_mode<__nv_bfloat16>(mode, wide(2), f);
    case DType::kFloat16:
      return with_mode<__half>(mode, wide(2), f);
  }
}

}  // namespace

void gated_resample_add_forward(const GatedResampleAddForward& a) {
  if (a.batch == 0) return;
  check_sizes(a);
  const DeviceGuard guard(a.place.device);
  with_type(a.dtype, mode_of(a), a.channels, aligned(a.low) && aligned(a.high) && aligned(a.y),
            [&](auto element, auto mode, auto count) {
              forward<decltype(element), decltype(mode)::value, decltype(count)::value>(a);
            });
}

void gated_resample_add_backward(const GatedResampleAddBackward& a) {
  if (a.batch == 0) return;
  check_sizes(a);
  const DeviceGuard guard(a.place.device);
  const bool addresses_aligned = aligned(a.grad_y) && aligned(a.high) && aligned(a.grad_high);
  with_type(a.dtype, mode_of(a), a.channels, addresses_aligned, [&](auto element, auto mode, auto count) {
    backward<decltype(element), decltype(mode)::value, decltype(count)::value>(a);
  });
}

}  // namespace mra::cuda
