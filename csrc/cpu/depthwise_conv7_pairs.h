// The 7x7 convolution of bfloat16 maps on processors that multiply pairs of them (AVX512_BF16).
//
// One instruction adds two products, a*b + c*d, to a float in each lane. Rows are paired: a lane holds one channel of
// two pixels, one above the other. Output rows 2r and 2r + 1 both read the four pairs of input rows from 2r on, the
// first with taps (0,1) (2,3) (4,5) (6,-), the second with (-,0) (1,2) (3,4) (5,6). So an output costs 28 instructions
// instead of 49; 16 accumulators and 14 pairs of taps fill the registers. Products are exact and sums are float32.
//
// A pair's other half is multiplied by zero at the edge of the filter, which makes a NaN of an infinity or a NaN that
// the output should not see. So a tile whose outputs are not finite is not trusted, and convolved again in floats.
#pragma once

#include <immintrin.h>

#include "cpu/depthwise_conv7.h"

namespace mra::cpu::MRA_ISA {

// Channels of two pixels, 32 each, to two vectors of pairs: a is the first of a pair.
inline void interleave(__m512i a, __m512i b, __m512i* first, __m512i* second) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i order = _mm512_load_si512(kFirst);
  *first = _mm512_permutex2var_epi16(a, order, b);
  *second = _mm512_permutex2var_epi16(a, _mm512_add_epi16(order, _mm512_set1_epi16(16)), b);
}

template <>
struct Conv7<BFloat16> {
  using Value = __m512i;
  static constexpr bool kInPlace = false;
  static constexpr int kRowPairs = 4;                        // that an output row reads
  static constexpr int kTapVectors = 2 * kRowPairs * kTaps;  // [4, 2, 7]: row pair, parity of the output row, column
  static constexpr int kVectors = 2;                         // a cache line of a pixel
  static constexpr int kRows = 2;
  static constexpr int kPairs = kPatch / 2 * kPatch;
  static constexpr int kPatchValues = kVectors * kPairs;

  // patch: [2, 7, 14].
  static void copy_rows(const Window<BFloat16>& window, int64_t i, __m512i* patch) {
    const BFloat16* upper = window.has_row(i) ? window.pixel(i, 0) : nullptr;
    const BFloat16* lower = window.has_row(i + 1) ? window.pixel(i + 1, 0) : nullptr;
    const auto mask = static_cast<__mmask32>((uint64_t{1} << smaller(2 * kLanes, window.lanes)) - 1);
    // Outside the map nothing is loaded, not even under an empty mask: that is slow where no page is mapped.
    const auto load_pixel = [&](const BFloat16* row, int64_t j, bool inside) {
      if (row == nullptr || !inside) return _mm512_setzero_si512();
      return _mm512_maskz_loadu_epi16(mask, row + j * window.channels);
    };
    __m512i* out = patch + i / 2 * kPatch;
    window.for_each_column<kPatch>([&](int64_t j, bool inside) {
      interleave(load_pixel(upper, j, inside), load_pixel(lower, j, inside), out + j, out + kPairs + j);
    });
  }

  static void pack_channel(const BFloat16* column, bool flip, float* lane) {
    // One more, zero, for the halves of pairs that lie above or below the filter.
    uint16_t taps[kAllTaps + 1] = {};
    for (int t = 0; t < kAllTaps; ++t) taps[t] = column[flip ? kAllTaps - 1 - t : t].bits;
    const auto at = [](int row, int k) { return row < 0 || row >= kTaps ? kAllTaps : row * kTaps + k; };
#pragma GCC unroll 4
    for (int pair = 0; pair < kRowPairs; ++pair) {
#pragma GCC unroll 2
      for (int parity = 0; parity < 2; ++parity) {
#pragma GCC unroll 7
        for (int k = 0; k < kTaps; ++k) {
          const int row = 2 * pair - parity;
          const uint32_t bits = taps[at(row, k)] | static_cast<uint32_t>(taps[at(row + 1, k)]) << 16;
          std::memcpy(lane + ((pair * 2 + parity) * kTaps + k) * kLanes, &bits, sizeof bits);
        }
      }
    }
  }

  // Rows `row`, which is even, and row + 1.
  template <class In, class Columns, class Emit>
  static bool run(const In& inputs, Columns, int index, int row, const float* taps, Floats start, Emit emit) {
    __m512 even[kTile], odd[kTile];
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) even[o] = odd[o] = (__m512)start;
    for (int i = 0; i < kRowPairs; ++i) {
      __m512bh even_tap[kTaps], odd_tap[kTaps];
#pragma GCC unroll 7
      for (int k = 0; k < kTaps; ++k) {
        even_tap[k] = (__m512bh)_mm512_loadu_ps(taps + (2 * i * kTaps + k) * kLanes);
        odd_tap[k] = (__m512bh)_mm512_loadu_ps(taps + ((2 * i + 1) * kTaps + k) * kLanes);
      }
      const __m512i* input = inputs.values + index * kPairs + (row / 2 + i) * kPatch;
#pragma GCC unroll 14
      for (int j = 0; j < kPatch; ++j) {
        const __m512bh v = (__m512bh)input[j];
#pragma GCC unroll 7
        for (int k = 0; k < kTaps; ++k) {
          if (j - k < 0 || j - k >= kTile) continue;
          even[j - k] = _mm512_dpbf16_ps(even[j - k], v, even_tap[k]);
          odd[j - k] = _mm512_dpbf16_ps(odd[j - k], v, odd_tap[k]);
        }
      }
    }
    __m512 all = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) {
      emit(row, o, (Floats)even[o]);
      all = _mm512_add_ps(all, even[o]);
    }
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) {
      emit(row + 1, o, (Floats)odd[o]);
      all = _mm512_add_ps(all, odd[o]);
    }
    constexpr int kNanOrInfinity = 0x01 | 0x08 | 0x10 | 0x80;
    return _mm512_fpclass_ps_mask(all, kNanOrInfinity) == 0;
  }
};

}  // namespace mra::cpu::MRA_ISA
