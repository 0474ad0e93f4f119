// From a dtype and addresses to the types that a kernel is compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "launch.h"

namespace mra::cuda {

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
