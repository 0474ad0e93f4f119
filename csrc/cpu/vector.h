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

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef MRA_ISA
#error "MRA_ISA names the instruction set: baseline, avx2, avx512 or avx512_bf16"
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
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#else
  const Words w = (Words)v;
  const Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  const Words quiet_nan = (w >> 16) | 0x40u;
  const Words is_nan = (Words)(v != v);
  const Halves h = __builtin_convertvector((is_nan & quiet_nan) | (~is_nan & rounded), Halves);
  std::memcpy(p, &h, sizeof h);
#endif
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

// Stores past the caches, which saves reading the lines that a whole write replaces: for outputs larger than the
// second-level cache. p is aligned to the vector's size. `finish_streams` comes before another thread reads them.
inline void stream(float* p, Floats v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}

inline void stream(BFloat16* p, Floats v) {
#if defined(__AVX512BF16__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  store(p, v);
#endif
}

inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Whether to stream an output of rows of `channels`: it leaves the second-level cache anyway, and every row is aligned.
template <class T>
inline bool worth_streaming(const T* output, int64_t rows, int64_t channels) {
  constexpr int64_t kSecondLevelBytes = 1 << 20;
  const int64_t row_bytes = channels * static_cast<int64_t>(sizeof(T));
  return rows * row_bytes > kSecondLevelBytes && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(output) % 64 == 0;
}

// Asks for what is read soon, while there is other work: a pixel's channels are too few for the processor to see where
// they lead, and past its end comes another stream. What p points at need not exist. Inlined, because GCC takes a call
// that only fetches for one without effect, and drops it.
__attribute__((always_inline)) inline void fetch(const void* p) { __builtin_prefetch(p); }

// The same for n elements.
template <class T>
__attribute__((always_inline)) inline void fetch(const T* p, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += kLine) fetch(p + i);
}

// Halves are added to halves, so that few sums wait for each other.
inline float sum(Floats v) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    Words partner;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) partner[i] = i ^ half;
    v += __builtin_shuffle(v, partner);
  }
  return v[0];
}

// Calls use(c, lanes) for every vector of `channels`; the last one may have fewer lanes. The others have a constant
// count, with which load_first and store_first cost no test.
template <class Use>
inline void for_each_vector(int64_t channels, Use use) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) use(c, int64_t{kLanes});
  if (c < channels) use(c, channels - c);
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

// vector: [C], or null for zeros -> padded: float32, zero in the padding.
template <class T>
inline void pack_vector(const T* vector, float* padded, int64_t channels) {
  for_each_vector(channels, [&](int64_t c, int64_t lanes) {
    store(padded + c, vector == nullptr ? Floats{} : load_first(vector + c, lanes));
  });
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
