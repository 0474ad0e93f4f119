// From a dtype, addresses and sizes to what a kernel is compiled for and gets.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"

namespace mra::cuda {

// Kernels count channels in 32 bits; offsets have 64.
inline int check_channels(const char* op, int64_t channels) {
  if (channels >= INT32_MAX) {
    throw std::runtime_error(std::string(op) + ": " + std::to_string(channels) + " channels; must stay under 2^31");
  }
  return static_cast<int>(channels);
}

// Calls f(element, count): a value of the dtype's type, and how many elements an access may move: 16 bytes' worth where
// all addresses and the rows of `channels` elements are aligned, otherwise one.
template <class F>
void with_access(DType dtype, int64_t channels, std::initializer_list<const void*> addresses, F f) {
  const auto with = [&](auto element) {
    constexpr int kWide = 16 / sizeof(element);
    bool wide = channels % kWide == 0;
    for (const void* address : addresses) wide = wide && reinterpret_cast<uintptr_t>(address) % 16 == 0;
    wide ? f(element, std::integral_constant<int, kWide>{}) : f(element, std::integral_constant<int, 1>{});
  };
  switch (dtype) {
    case DType::kFloat32:
      return with(float{});
    case DType::kBFloat16:
      return with(__nv_bfloat16{});
    case DType::kFloat16:
      return with(__half{});
  }
}

}  // namespace mra::cuda
