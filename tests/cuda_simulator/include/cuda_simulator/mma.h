// The tensor core's product of a warp, for the stand-ins of a project's inline PTX.
#pragma once

#include <cstdint>

#include "cuda_simulator/engine.h"
#include "cuda_simulator/float16.h"

namespace cuda_simulator {

// mma.sync.aligned.m16n8k16.row.col.f32: d += a b, a: [16, 16], b: [16, 8], d: [16, 8], in the fragments that the PTX
// manual draws. T is a 16-bit type. The sum is exact and rounded once; a GPU's is not, and its order is not documented.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  constexpr int kWords = 3;
  const uint64_t mine[kWords] = {a[0] | uint64_t{a[1]} << 32, a[2] | uint64_t{a[3]} << 32, b[0] | uint64_t{b[1]} << 32};
  uint64_t all[32 * kWords];
  warp_gather(mine, kWords, all, {"mma.sync", file, line});
  // Element `k` of the row or column that the lanes 4 * group ... hold from `word` on.
  const auto element = [&](int group, int k, int word, int half) {
    const uint64_t registers = all[(4 * group + k % 8 / 2) * kWords + word];
    return static_cast<double>(T::of_bits(static_cast<uint16_t>(registers >> (32 * half + 16 * (k % 2)))));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4, column = lane() % 4 * 2 + i % 2;
    double sum = d[i];
    // Of a, a register pair holds rows g and g + 8, two pairs columns 0-7 and 8-15; of b, a pair holds all rows.
    for (int k = 0; k < 16; ++k) sum += element(row, k, k / 8, i / 2) * element(column, k, 2, k / 8);
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace cuda_simulator
