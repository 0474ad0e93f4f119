// One SIMD vector of floats, as wide as the instruction set that this file is compiled for.
//
// Every kernel source is compiled once per instruction set, with MRA_ISA naming it and its namespace. Nothing here may
// be shared between those builds: an inline function of the standard library, compiled with AVX-512 and kept by the
// linker for all, would stop older processors. So kernels use no containers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "launch.h"

#ifndef MRA_ISA
#error "MRA_ISA names the instruction set: baseline, avx2 or avx512"
#endif

namespace mra::cpu::MRA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};

inline Floats broadcast(float value) { return Floats{} + value; }

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// A cast between vectors of one size keeps the bits.
inline Floats load(const BFloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest even; a NaN stays a NaN.
inline void store(BFloat16* p, Floats v) {
  const Words w = (Words)v;
  const Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  const Words quiet_nan = (w >> 16) | 0x40u;
  const Words is_nan = (Words)(v != v);
  const Halves h = __builtin_convertvector((is_nan & quiet_nan) | (~is_nan & rounded), Halves);
  std::memcpy(p, &h, sizeof h);
}

inline float load_one(const float* p) { return *p; }

inline float load_one(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The first `n` lanes; the others are zero.
template <class T>
inline Floats load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store_first(T* p, Floats v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Aligned, uninitialised memory for one call.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(std::aligned_alloc(64, round_up(n * sizeof(T) + 1, 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Memory for floats that a thread keeps from call to call, one piece for each `Use`: faulting in fresh pages can cost
// more than the work on them. It grows and never shrinks; its contents do not outlive the call.
template <class Use>
inline float* thread_buffer(int64_t n) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < n) {
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, round_up(n * sizeof(float), 64)));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = n;
  }
  return buffer.data;
}

// Calls f with a value of the element type of `dtype`.
template <class F>
inline void with_type(DType dtype, F f) {
  if (dtype == DType::kBFloat16) {
    f(BFloat16{});
  } else {
    f(0.0f);
  }
}

}  // namespace mra::cpu::MRA_ISA
