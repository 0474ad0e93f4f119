// In place of csrc/common/mma.cuh, whose PTX is for nvcc alone.
#pragma once

#include "cuda_simulator/mma.h"

namespace mra::cuda {

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint2 b, const float (&c)[4]) {
  const uint32_t pair[2] = {b.x, b.y};
  cuda_simulator::mma_m16n8k16<T>(d, a, pair, c);
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint2 b) {
  mma<T>(d, a, b, d);
}

inline void load_matrices(uint32_t (&m)[4], const void* row) { cuda_simulator::ldmatrix_x4(m, row, false); }
inline void load_transposed(uint32_t (&m)[4], const void* row) { cuda_simulator::ldmatrix_x4(m, row, true); }

}  // namespace mra::cuda
