// Depthwise 7x7 convolution over a channels-last map, by tiles of 8x8 outputs and a group of channels at a time.
//
// A row of outputs takes 14 inputs and 7 taps from each of seven rows: 21 loads for 56 multiply-adds into 8
// accumulators that stay in registers over all seven rows, so that the multiply-adds are issued without a gap. Inputs
// are read where they lie, and rows and columns outside the map are left out. They are copied to a patch first only
// where they must be widened, where a tile or a vector of channels sticks out of the map, and where the stride of C
// elements would crowd them into two sets of the first-level cache. Processors that multiply pairs of bfloat16 have an
// arithmetic of their own, in depthwise_conv7_pairs.h.
#pragma once

#include "cpu/tiles.h"

namespace mra::cpu::MRA_ISA {

// The inputs of a tile where they lie in the map, for a group of channels.
template <class T>
struct InMap {
  const Window<T>& window;

  void prepare(int64_t) {}
  bool has_row(int64_t i) const { return window.has_row(i); }
  const T* at(int64_t i, int64_t j) const { return window.pixel(i, j); }
  int64_t step() const { return window.channels; }
};

// The same, copied as Conv reads them, a few rows at a time: just before they are needed, because the processor has
// multiply-adds to do while it waits for them.
template <class Conv, class T>
struct Patch {
  const Window<T>& window;
  int64_t ready = 0;  // rows
  alignas(64) typename Conv::Value values[Conv::kPatchValues];

  explicit Patch(const Window<T>& w) : window(w) {}  // that leaves values as they are

  void prepare(int64_t end) {
    for (; ready < end; ready += Conv::kRows) Conv::copy_rows(window, ready, values);
  }
  bool has_row(int64_t i) const { return window.has_row(i); }
  const typename Conv::Value* at(int64_t i, int64_t j) const { return values + (i * kPatch + j) * kLanes; }
  int64_t step() const { return kLanes; }
};

// The columns that exist; the others are zero.
template <int kBegin, int kEnd>
struct Columns {
  static constexpr int kFirst = kBegin, kLast = kEnd;
};

// What convolving in floats needs, for maps of T: how taps are packed, how inputs are held, the multiply-adds.
template <class T>
struct FloatConv7 {
  using Value = float;                                          // that the multiply-adds read
  static constexpr bool kInPlace = sizeof(T) == sizeof(Value);  // where the map has it
  static constexpr int kTapVectors = kAllTaps;                  // of a vector of channels
  static constexpr int kVectors = 1;                            // of channels, and
  static constexpr int kRows = 1;                               // of outputs, that are convolved together
  static constexpr int kPatchValues = kPatch * kPatch * kLanes;

  // patch: [kPatch, kPatch, kLanes].
  static void copy_rows(const Window<T>& window, int64_t i, float* patch) {
    if (window.has_row(i)) load_row<kPatch>(window, i, patch + i * kPatch * kLanes);
  }

  // column: the 49 taps of a channel; lane: where the first belongs, the next one kLanes further.
  static void pack_channel(const T* column, bool flip, float* lane) {
    for (int t = 0; t < kAllTaps; ++t) lane[t * kLanes] = load_one(column + (flip ? kAllTaps - 1 - t : t));
  }

  // Calls emit(row, column, sums) for the 8 outputs of a row: start + the convolution of the group's vector `index`.
  // taps: [49, kLanes]. Returns whether the outputs can be trusted.
  template <class In, class Columns, class Emit>
  static bool run(const In& inputs, Columns, int, int row, const float* taps, Floats start, Emit emit) {
    Floats acc[kTile];
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) acc[o] = start;
    for (int i = 0; i < kTaps; ++i) {
      if (!inputs.has_row(row + i)) continue;
      Floats tap[kTaps];
#pragma GCC unroll 7
      for (int k = 0; k < kTaps; ++k) tap[k] = load(taps + (i * kTaps + k) * kLanes);
      const float* input = inputs.at(row + i, Columns::kFirst);
#pragma GCC unroll 14
      for (int j = Columns::kFirst; j < Columns::kLast; ++j) {
        const Floats v = load(input + (j - Columns::kFirst) * inputs.step());
#pragma GCC unroll 7
        for (int k = 0; k < kTaps; ++k) {
          if (j - k >= 0 && j - k < kTile) acc[j - k] += v * tap[k];
        }
      }
    }
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) emit(row, o, acc[o]);
    return true;
  }
};

template <class T>
struct Conv7 : FloatConv7<T> {};

}  // namespace mra::cpu::MRA_ISA

#if defined(__AVX512BF16__)
#include "cpu/depthwise_conv7_pairs.h"
#endif

namespace mra::cpu::MRA_ISA {

// Calls use(inputs, columns) with the inputs of a window as Conv reads them.
template <class Conv, class T, class Use>
inline void with_inputs(const Window<T>& window, Use use) {
  if constexpr (Conv::kInPlace) {
    constexpr int64_t kCrowdingBytes = 2048;
    const bool crowded = window.channels * sizeof(T) % kCrowdingBytes == 0;
    if (window.lanes >= Conv::kVectors * kLanes && !crowded) {
      InMap<T> inputs{window};
      const int64_t left = window.left, right = window.width - window.left;
      if (left >= 0 && right >= kPatch) return use(inputs, Columns<0, kPatch>{});
      if (left == -kPad && right >= kPatch) return use(inputs, Columns<kPad, kPatch>{});
      if (left >= 0 && right == kPatch - kPad) return use(inputs, Columns<0, kPatch - kPad>{});
      if (left == -kPad && right == kPatch - kPad) return use(inputs, Columns<kPad, kPatch - kPad>{});
    }
  }
  Patch<Conv, T> patch(window);
  use(patch, Columns<0, kPatch>{});
}

// The taps of the vector of channels from c on: weight: [C, 49] -> packed: [kTapVectors, kLanes], zero in the padding;
// `flip` turns the taps around, for the input's gradient.
template <class Conv, class T>
inline void pack_taps(const T* weight, int64_t channels, int64_t c, bool flip, float* packed) {
  std::memset(packed, 0, Conv::kTapVectors * kLanes * sizeof(float));
  for (int64_t lane = 0; lane < smaller(kLanes, channels - c); ++lane) {
    Conv::pack_channel(weight + (c + lane) * kAllTaps, flip, packed + lane);
  }
}

// Weight and bias as the inner loops read them, in buffers of the calling thread.
template <class T>
class Convolution {
 public:
  // weight: [C, 49]; bias: [C], or null for none; `flip` turns the taps around.
  Convolution(const void* weight, const void* bias, int64_t channels, bool flip, int threads)
      : weight_(static_cast<const T*>(weight)),
        channels_(channels),
        flip_(flip),
        taps_(thread_buffer<struct Taps>(Conv7<T>::kTapVectors * round_up(channels, kLanes))),
        bias_(thread_buffer<struct Bias>(round_up(channels, kLanes))) {
    pack_vector(static_cast<const T*>(bias), bias_, channels);
#pragma omp parallel for num_threads(threads)
    for (int64_t c = 0; c < channels; c += kLanes) {
      pack_taps<Conv7<T>>(weight_, channels, c, flip, taps_ + Conv7<T>::kTapVectors * c);
    }
  }

  // Channels that are convolved together.
  static constexpr int64_t kGroup = Conv7<T>::kVectors * kLanes;

  // Rows of outputs that `run` emits.
  static int64_t rows(const Tile& tile) { return round_up(tile.rows, Conv7<T>::kRows); }

  // Convolves a tile's group of channels from `first` on, calling emit(c, row, column, sums) for each vector of
  // channels and each output of the tile, and some right of or below the map. Before the outputs of a row, for all
  // vectors of the group, comes before(row). Meanwhile it fetches what the tile to the right reads beyond this one into
  // the second-level cache.
  template <class Before, class Emit>
  void run(const Map<const T>& map, const Tile& tile, int64_t first, Before before, Emit emit) const {
    using Conv = Conv7<T>;
    const Window<T> window(map, tile, kPad, first);
    bool trusted[Conv::kVectors];
    for (bool& each : trusted) each = true;
    with_inputs<Conv>(window, [&](auto& inputs, auto columns) {
      for (int row = 0; row < tile.rows; row += Conv::kRows) {
        inputs.prepare(row + Conv::kRows + 2 * kPad);
        for (int i = row; i < row + Conv::kRows; ++i) {
          fetch_right(window, i);
          if (i + kTile < kPatch) fetch_right(window, i + kTile);
          before(i);
        }
        for (int v = 0; v < Conv::kVectors; ++v) {
          const int64_t c = first + v * kLanes;
          if (c >= map.channels) break;
          trusted[v] &= Conv::run(inputs, columns, v, row, taps_ + Conv::kTapVectors * c, load(bias_ + c),
                                  [&](int r, int column, Floats sums) { emit(c, r, column, sums); });
        }
      }
    });
    for (int v = 0; v < Conv::kVectors; ++v) {
      if (!trusted[v]) run_in_floats(map, tile, first + v * kLanes, emit);
    }
  }

  // All channels of a tile.
  template <class Emit>
  void run_tile(const Map<const T>& map, const Tile& tile, Emit emit) const {
    for (int64_t first = 0; first < map.channels; first += kGroup) run(map, tile, first, [](int) {}, emit);
  }

 private:
  // Row i of what the window one tile to the right adds to this one. Inlined, because GCC takes a call that only
  // prefetches for one without effect, and drops it.
  __attribute__((always_inline)) static void fetch_right(const Window<T>& window, int64_t i) {
    if (!window.has_row(i) || window.left + kPatch + kTile > window.width) return;
    const T* row = window.pixel(i, kPatch);
#pragma GCC unroll 8
    for (int64_t j = 0; j < kTile; ++j) __builtin_prefetch(row + j * window.channels, 0, 2);
  }

  // One vector of channels, whatever arithmetic the maps have.
  template <class Emit>
  __attribute__((noinline)) void run_in_floats(const Map<const T>& map, const Tile& tile, int64_t c, Emit emit) const {
    alignas(64) float taps[FloatConv7<T>::kTapVectors * kLanes];
    pack_taps<FloatConv7<T>>(weight_, channels_, c, flip_, taps);
    with_inputs<FloatConv7<T>>(Window<T>(map, tile, kPad, c), [&](auto& inputs, auto columns) {
      for (int row = 0; row < tile.rows; ++row) {
        inputs.prepare(row + 1 + 2 * kPad);
        FloatConv7<T>::run(inputs, columns, 0, row, taps, load(bias_ + c),
                           [&](int r, int column, Floats sums) { emit(c, r, column, sums); });
      }
    });
  }

  const T* weight_;
  int64_t channels_;
  bool flip_;
  float *taps_, *bias_;
};

}  // namespace mra::cpu::MRA_ISA
