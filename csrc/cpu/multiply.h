// Small matrix products whose sums stay in registers, for what no product of the library computes.
//
// Products are taken over units of 32 bits: a float or, on processors that multiply pairs of them (AVX512_BF16), two
// bfloat16 of neighbouring depths. Without that instruction bfloat16 is widened to floats when it is packed.
#pragma once

#include "cpu/vector.h"

namespace mra::cpu::MRA_ISA {

// The sums of one step, where there are many: rows, and vectors of columns. They and the vectors they are made of fill
// the registers.
constexpr int kSumRows = 4;
constexpr int kSumVectors = kLanes == 16 ? 4 : 2;
constexpr int kSumLanes = kSumVectors * kLanes;

template <class T>
struct Units {
  static constexpr int kCount = 1;  // elements in a unit

  // sum + unit * units, the unit for all lanes.
  static Floats multiply_add(Floats sum, const float* unit, Floats units) { return sum + *unit * units; }

  // Elements i to i + kLanes of a row, to its units.
  static void store_row(float* row, int64_t i, Floats v) { store(row + i, v); }

  // A vector of one row and one of the next, to the units of both; a row of units is `stride` long.
  static void store_rows(float* units, int64_t stride, Floats first, Floats second) {
    store(units, first);
    store(units + stride, second);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Units<BFloat16> {
  static constexpr int kCount = 2;

  static Floats multiply_add(Floats sum, const float* unit, Floats units) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(*unit), (__m512bh)units);
  }

  static void store_row(float* row, int64_t i, Floats v) { store(reinterpret_cast<BFloat16*>(row) + i, v); }

  static void store_rows(float* units, int64_t, Floats first, Floats second) {
    const Words low = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)first), Words);
    const Words high = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)second), Words);
    store(units, (Floats)(low | high << 16));
  }
};
#endif

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Sums of kRows rows, at most 8, and kVectors vectors of columns, at most 4: they begin with start(row, vector) and end
// in finish(row, vector, sum). a: units of the rows, a row's `row_stride` and a depth's `depth_stride` apart; b: units
// of the columns, a depth's `columns` apart.
template <class T, int kRows, int kVectors, class Start, class Finish>
inline void multiply(const float* a, int64_t row_stride, int64_t depth_stride, const float* b, int64_t columns,
                     int64_t depths, Start start, Finish finish) {
  Floats sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[row][v] = start(row, v);
  }
  for (int64_t k = 0; k < depths; ++k) {
    Floats column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + k * columns + v * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[row][v] = Units<T>::multiply_add(sums[row][v], a + row * row_stride + k * depth_stride, column[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) finish(row, v, sums[row][v]);
  }
}

// Calls step(c, Constant<vectors>) for runs of columns that `multiply` takes at once; columns: a multiple of kLanes.
template <class Step>
inline void for_each_run(int64_t columns, Step step) {
  int64_t c = 0;
  for (; c + kSumLanes <= columns; c += kSumLanes) step(c, Constant<kSumVectors>{});
  const int64_t left = (columns - c) / kLanes;
  if (left == 1) step(c, Constant<1>{});
  if (left == 2) step(c, Constant<2>{});
  if (left == 3) step(c, Constant<3>{});
}

}  // namespace mra::cpu::MRA_ISA
