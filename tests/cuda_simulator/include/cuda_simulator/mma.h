// The tensor core's product of a warp and the loads of its operands, for the stand-ins of a project's inline PTX.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_simulator/engine.h"
#include "cuda_simulator/float16.h"

namespace cuda_simulator {

// A lane's operands as numbers, two neighboring ones a register: of a, rows g and g + 8 of columns 0-7, then of 8-15;
// of b, rows 0-7, then 8-15.
struct MmaOperands {
  float registers[6][2];
};

// Not watched by sanitizers, which would make it ten times as slow: it touches nothing but what a warp has gathered.
__attribute__((no_sanitize("address", "undefined", "thread"))) inline float mma_sum(const MmaOperands* row,
                                                                                    const MmaOperands* column, int half,
                                                                                    double sum) {
  for (int k = 0; k < 16; ++k) {
    const double a = row[k % 8 / 2].registers[k / 8 * 2 + half][k % 2];
    sum += a * column[k % 8 / 2].registers[4 + k / 8][k % 2];
  }
  return static_cast<float>(sum);
}

// mma.sync.aligned.m16n8k16.row.col.f32: d = a b + c, a: [16, 16], b: [16, 8], c and d: [16, 8], in the fragments that
// the PTX manual draws. T is a 16-bit type. The sum is exact and rounded once; a GPU's is not, and its order is not
// documented.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const uint32_t registers[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  MmaOperands mine;
  for (int i = 0; i < 6; ++i) {
    mine.registers[i][0] = T::of_bits(static_cast<uint16_t>(registers[i]));
    mine.registers[i][1] = T::of_bits(static_cast<uint16_t>(registers[i] >> 16));
  }
  constexpr int kWords = sizeof mine / sizeof(uint64_t);
  uint64_t words[kWords];
  std::memcpy(words, &mine, sizeof mine);
  const auto* lanes = reinterpret_cast<const MmaOperands*>(warp_gather(words, kWords, {"mma.sync", file, line}));
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) d[i] = mma_sum(lanes + 4 * g, lanes + 4 * (2 * t + i % 2), i / 2, c[i]);
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16, and with .trans: four matrices of 8 x 8 16-bit elements, lane 8 i + r names
// row r of matrix i.
inline void ldmatrix_x4(uint32_t (&d)[4], const void* row, bool transposed, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  const uint64_t mine[1] = {reinterpret_cast<uintptr_t>(row)};
  if (mine[0] % 16 != 0) fail("a row of ldmatrix does not start at a multiple of 16 bytes");
  const uint64_t* rows = warp_gather(mine, 1, {"ldmatrix", file, line});
  const auto element = [&](int matrix, int r, int column) {
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const char*>(rows[8 * matrix + r]) + 2 * column, sizeof bits);
    return uint32_t{bits};
  };
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    d[i] = transposed ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16
                      : element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16;
  }
}

}  // namespace cuda_simulator
