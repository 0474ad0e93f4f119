// The 16-bit types' conversions and operations, one number at a time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {

template <class T>
void from_float(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = T(x[i]).bits;
}

template <class T>
void to_float(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = T::of_bits(x[i]);
}

}  // namespace

extern "C" {

void bfloat16_from_float(const float* x, uint16_t* y, int64_t n) { from_float<__nv_bfloat16>(x, y, n); }
void float16_from_float(const float* x, uint16_t* y, int64_t n) { from_float<__half>(x, y, n); }
void bfloat16_to_float(const uint16_t* x, float* y, int64_t n) { to_float<__nv_bfloat16>(x, y, n); }
void float16_to_float(const uint16_t* x, float* y, int64_t n) { to_float<__half>(x, y, n); }

// y[0..5]: a pair's sum, product and fused multiply-add.
void pair_operations(const float* x, float* y) {
  const __nv_bfloat162 a = __floats2bfloat162_rn(x[0], x[1]), b = __floats2bfloat162_rn(x[2], x[3]);
  const float2 sum = __bfloat1622float2(__hadd2(a, b)), product = __bfloat1622float2(a * b);
  const float2 fused = __bfloat1622float2(__hfma2(a, b, a));
  y[0] = sum.x, y[1] = sum.y, y[2] = product.x, y[3] = product.y, y[4] = fused.x, y[5] = fused.y;
}

}  // extern "C"
