// dim3, and the vector types with CUDA's alignments.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define CUDA_SIMULATOR_VECTORS(type, name)                                                    \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

CUDA_SIMULATOR_VECTORS(signed char, char)
CUDA_SIMULATOR_VECTORS(unsigned char, uchar)
CUDA_SIMULATOR_VECTORS(short, short)
CUDA_SIMULATOR_VECTORS(unsigned short, ushort)
CUDA_SIMULATOR_VECTORS(int, int)
CUDA_SIMULATOR_VECTORS(unsigned, uint)
CUDA_SIMULATOR_VECTORS(long long, longlong)
CUDA_SIMULATOR_VECTORS(unsigned long long, ulonglong)
CUDA_SIMULATOR_VECTORS(float, float)
CUDA_SIMULATOR_VECTORS(double, double)
#undef CUDA_SIMULATOR_VECTORS

struct float3 {
  float x, y, z;
};
struct int3 {
  int x, y, z;
};
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
