// The 16-bit types: bit patterns, rounding to nearest even, and arithmetic that is rounded after every operation.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda_simulator/math.h"
#include "cuda_simulator/vector_types.h"

namespace cuda_simulator {

struct BFloat16Bits {
  static uint16_t from(float v) {
    const auto bits = bit_cast<uint32_t>(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
  static float to(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

struct HalfBits {
  static uint16_t from(float v) {
    const auto bits = bit_cast<uint32_t>(v);
    const uint32_t magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    if (magnitude > 0x7f800000u) return 0x7fff;
    // 65536 and more; what lies between the largest half and it rounds below.
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
    // Subnormal: beside 0.5 a float has the half's last place, so that the addition rounds.
    if (magnitude < 0x38800000u) {
      const auto rounded = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f);
      return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
  static float to(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 0x1fu, fraction = bits & 0x3ffu;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
      return sign != 0 ? -magnitude : magnitude;
    }
    return bit_cast<float>(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
  }
};

template <class Bits>
struct Float16 {
  uint16_t bits;

  Float16() = default;
  template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
  Float16(Number v) : bits(Bits::from(static_cast<float>(v))) {}
  operator float() const { return Bits::to(bits); }

  static Float16 of_bits(uint16_t bits) {
    Float16 v;
    v.bits = bits;
    return v;
  }
  friend Float16 operator+(Float16 a, Float16 b) { return float(a) + float(b); }
  friend Float16 operator-(Float16 a, Float16 b) { return float(a) - float(b); }
  friend Float16 operator*(Float16 a, Float16 b) { return float(a) * float(b); }
  friend Float16 operator/(Float16 a, Float16 b) { return float(a) / float(b); }
  friend Float16 operator-(Float16 a) { return of_bits(a.bits ^ 0x8000u); }
  Float16& operator+=(Float16 b) { return *this = *this + b; }
  Float16& operator-=(Float16 b) { return *this = *this - b; }
  Float16& operator*=(Float16 b) { return *this = *this * b; }
};

template <class T>
struct alignas(4) Pair {
  T x, y;

  friend Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
  friend Pair operator-(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }
  friend Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
};

}  // namespace cuda_simulator

// The functions of both types, whose names differ: `name` is bfloat16 or half.
#define CUDA_SIMULATOR_FLOAT16(T, T2, name)                                   \
  inline T __float2##name(float v) { return v; }                              \
  inline T __float2##name##_rn(float v) { return v; }                         \
  inline T __double2##name(double v) { return static_cast<float>(v); }        \
  inline float __##name##2float(T v) { return v; }                            \
  inline T __ushort_as_##name(unsigned short v) { return T::of_bits(v); }     \
  inline unsigned short __##name##_as_ushort(T v) { return v.bits; }          \
  inline T2 __float2##name##2_rn(float v) { return {v, v}; }                  \
  inline T2 __floats2##name##2_rn(float x, float y) { return {x, y}; }        \
  inline T2 __float22##name##2_rn(float2 v) { return {v.x, v.y}; }            \
  inline float2 __##name##22float2(T2 v) { return {float(v.x), float(v.y)}; } \
  inline T2 __##name##2##name##2(T v) { return {v, v}; }                      \
  inline T2 __halves2##name##2(T x, T y) { return {x, y}; }                   \
  inline T2 make_##name##2(T x, T y) { return {x, y}; }                       \
  inline T __low2##name(T2 v) { return v.x; }                                 \
  inline T __high2##name(T2 v) { return v.y; }                                \
  inline float __low2float(T2 v) { return v.x; }                              \
  inline float __high2float(T2 v) { return v.y; }                             \
  inline T __hadd(T a, T b) { return a + b; }                                 \
  inline T __hsub(T a, T b) { return a - b; }                                 \
  inline T __hmul(T a, T b) { return a * b; }                                 \
  inline T __hfma(T a, T b, T c) { return fmaf(a, b, c); }                    \
  inline T __hneg(T a) { return -a; }                                         \
  inline T __hmax(T a, T b) { return fmaxf(a, b); }                           \
  inline T __hmin(T a, T b) { return fminf(a, b); }                           \
  inline T2 __hadd2(T2 a, T2 b) { return a + b; }                             \
  inline T2 __hsub2(T2 a, T2 b) { return a - b; }                             \
  inline T2 __hmul2(T2 a, T2 b) { return a * b; }                             \
  inline T2 __hfma2(T2 a, T2 b, T2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
