// Depthwise 7x7 convolution over a channels-last map, by tiles of 8x8 outputs and one vector of channels at a time.
//
// The 14x14 inputs of a tile are first copied to a patch in the first-level cache: that widens them once, puts zeros
// outside the map, and undoes the stride of C elements, which would crowd them into a few cache sets. From there a row
// of taps costs 14 + 7 loads for 56 multiply-adds into 8 accumulators that stay in registers over all seven rows: the
// multiply-adds are issued without a gap. Processors that multiply pairs of bfloat16 have an arithmetic of their own,
// in depthwise_conv7_pairs.h.
#pragma once

#include "cpu/vector.h"

namespace mra::cpu::MRA_ISA {

constexpr int kTaps = 7;
constexpr int kAllTaps = kTaps * kTaps;
constexpr int kPad = 3;
constexpr int kTile = 8;
constexpr int kPatch = kTile + 2 * kPad;

// A map [B, H, W, C], cut into tiles of 8x8 pixels.
template <class T>
struct Map {
  T* data;
  int64_t batch, height, width, channels;

  T* pixel(int64_t b, int64_t y, int64_t x) const { return data + ((b * height + y) * width + x) * channels; }
  int64_t padded() const { return round_up(channels, kLanes); }
  int64_t tiles_y() const { return (height + kTile - 1) / kTile; }
  int64_t tiles_x() const { return (width + kTile - 1) / kTile; }
  int64_t tiles() const { return batch * tiles_y() * tiles_x(); }
};

// Where a tile lies, and how much of it lies inside the map.
struct Tile {
  int64_t b, y, x, rows, columns;
};

template <class T>
inline Tile tile_at(const Map<T>& map, int64_t index) {
  const int64_t y = index / map.tiles_x() % map.tiles_y() * kTile, x = index % map.tiles_x() * kTile;
  return {index / (map.tiles_x() * map.tiles_y()), y, x, smaller(kTile, map.height - y), smaller(kTile, map.width - x)};
}

// Calls visit(row, column) for each pixel of the tile that lies inside the map.
template <class Visit>
inline void for_each_pixel(const Tile& tile, Visit visit) {
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t column = 0; column < tile.columns; ++column) visit(row, column);
  }
}

// Tasks for work that sums nothing over tiles: whole rows of tiles, as neighbors share inputs in a thread's cache, or
// fewer tiles where that would leave threads idle.
template <class T>
inline int64_t row_tasks(const Map<T>& map, int threads) {
  return smaller(map.tiles(), larger(map.batch * map.tiles_y(), 4 * threads));
}

// Runs visit(task, tile) for every tile. The tiles are dealt to tasks whatever the number of threads, and a task visits
// its own in order, so that a sum kept for each task repeats bit for bit.
template <class T, class Visit>
inline void for_each_tile(const Map<T>& map, int64_t tasks, int threads, Visit visit) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t end = map.tiles() * (task + 1) / tasks;
    for (int64_t i = map.tiles() * task / tasks; i < end; ++i) visit(task, tile_at(map, i));
  }
}

// Where the kSize x kSize inputs of a tile lie, from channel c on; outside the map they are zero.
template <class T>
struct Window {
  const T* origin;  // of the picture, at channel c
  int64_t height, width, channels, top, left;
  int64_t lanes;  // channels from c on

  Window(const Map<const T>& map, const Tile& tile, int64_t pad, int64_t c)
      : origin(map.pixel(tile.b, 0, 0) + c),
        height(map.height),
        width(map.width),
        channels(map.channels),
        top(tile.y - pad),
        left(tile.x - pad),
        lanes(map.channels - c) {}

  bool has_row(int64_t i) const { return top + i >= 0 && top + i < height; }
  const T* pixel(int64_t i, int64_t j) const { return origin + ((top + i) * width + left + j) * channels; }

  // Calls use(j, inside) for each of kSize columns; the bounds of the common case are constant.
  template <int kSize, class Use>
  void for_each_column(Use use) const {
    if (left >= 0 && left + kSize <= width) {
#pragma GCC unroll 14
      for (int64_t j = 0; j < kSize; ++j) use(j, true);
    } else {
      const int64_t first = larger(0, -left), last = smaller(kSize, width - left);
      for (int64_t j = 0; j < first; ++j) use(j, false);
      for (int64_t j = first; j < last; ++j) use(j, true);
      for (int64_t j = larger(first, last); j < kSize; ++j) use(j, false);
    }
  }
};

// Row i of a window, one vector of channels, widened: [kSize, kLanes].
template <int kSize, class T>
inline void load_row(const Window<T>& window, int64_t i, Floats* out) {
  if (!window.has_row(i)) {
    std::memset(out, 0, kSize * sizeof(Floats));
    return;
  }
  const T* row = window.pixel(i, 0);
  if (window.lanes >= kLanes) {
    window.template for_each_column<kSize>(
        [&](int64_t j, bool inside) { out[j] = inside ? load(row + j * window.channels) : Floats{}; });
  } else {
    window.template for_each_column<kSize>([&](int64_t j, bool inside) {
      out[j] = inside ? load_first(row + j * window.channels, window.lanes) : Floats{};
    });
  }
}

// What convolving a tile in floats needs, for maps of T: how taps are packed, how inputs are held, the multiply-adds.
template <class T>
struct FloatConv7 {
  static constexpr int kTapVectors = kAllTaps;  // of a vector of channels
  static constexpr int kVectors = 1;            // of channels that a patch holds

  struct Patch {
    alignas(64) Floats values[kPatch * kPatch];
  };

  static constexpr int kLoads = kPatch;  // calls of load_part that fill a patch

  static void load_part(const Window<T>& window, int part, Patch& patch) {
    load_row<kPatch>(window, part, patch.values + part * kPatch);
  }

  // column: the 49 taps of a channel; lane: where the first belongs, the next one kLanes further.
  static void pack_channel(const T* column, bool flip, float* lane) {
    for (int t = 0; t < kAllTaps; ++t) lane[t * kLanes] = load_one(column + (flip ? kAllTaps - 1 - t : t));
  }

  // Calls emit(row, column, sums) for each output of the 8x8 tile: start + the convolution of the patch's vector
  // `index`. taps: [49, kLanes]. Returns whether the outputs can be trusted.
  template <class Emit>
  static bool run(const Patch& patch, int, const float* taps, Floats start, Emit emit) {
    for (int row = 0; row < kTile; ++row) {
      Floats acc[kTile];
#pragma GCC unroll 8
      for (int o = 0; o < kTile; ++o) acc[o] = start;
      for (int i = 0; i < kTaps; ++i) {
        Floats tap[kTaps];
#pragma GCC unroll 7
        for (int k = 0; k < kTaps; ++k) tap[k] = load(taps + (i * kTaps + k) * kLanes);
        const Floats* input = patch.values + (row + i) * kPatch;
#pragma GCC unroll 14
        for (int j = 0; j < kPatch; ++j) {
          const Floats v = input[j];
#pragma GCC unroll 7
          for (int k = 0; k < kTaps; ++k) {
            if (j - k >= 0 && j - k < kTile) acc[j - k] += v * tap[k];
          }
        }
      }
#pragma GCC unroll 8
      for (int o = 0; o < kTile; ++o) emit(row, o, acc[o]);
    }
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

  // Convolves a tile's group of channels from `first` on, calling emit(c, row, column, sums) for each vector of
  // channels and each output of the 8x8 tile, those outside the map included. Meanwhile it fetches what the tile to the
  // right reads beyond this one into the second-level cache.
  template <class Emit>
  void run(const Map<const T>& map, const Tile& tile, int64_t first, Emit emit) const {
    const Window<T> window(map, tile, kPad, first);
    typename Conv7<T>::Patch patch;
    for (int part = 0; part < Conv7<T>::kLoads; ++part) Conv7<T>::load_part(window, part, patch);
    const int64_t right = smaller(window.left + kPatch, map.width - kTile);
    const T* fetched = larger(window.top, 0) + kPatch <= map.height && right >= 0
                           ? map.pixel(tile.b, larger(window.top, 0), right) + first
                           : nullptr;
    for (int i = 0; i < Conv7<T>::kVectors; ++i) {
      const int64_t c = first + i * kLanes;
      if (c >= map.channels) break;
      const float* taps = taps_ + Conv7<T>::kTapVectors * c;
      const bool trusted = Conv7<T>::run(patch, i, taps, load(bias_ + c), [&](int row, int column, Floats v) {
        emit(c, row, column, v);
        if (i > 0 || fetched == nullptr) return;
        __builtin_prefetch(fetched + (row * map.width + column) * map.channels, 0, 2);
        if (row + kTile >= kPatch) return;
        __builtin_prefetch(fetched + ((row + kTile) * map.width + column) * map.channels, 0, 2);
      });
      if (!trusted) run_in_floats(map, tile, c, emit);
    }
  }

  // All channels of a tile.
  template <class Emit>
  void run_tile(const Map<const T>& map, const Tile& tile, Emit emit) const {
    for (int64_t first = 0; first < map.channels; first += kGroup) run(map, tile, first, emit);
  }

 private:
  // One vector of channels, whatever arithmetic the maps have.
  template <class Emit>
  __attribute__((noinline)) void run_in_floats(const Map<const T>& map, const Tile& tile, int64_t c, Emit emit) const {
    alignas(64) float taps[FloatConv7<T>::kTapVectors * kLanes];
    pack_taps<FloatConv7<T>>(weight_, channels_, c, flip_, taps);
    typename FloatConv7<T>::Patch patch;
    const Window<T> window(map, tile, kPad, c);
    for (int part = 0; part < FloatConv7<T>::kLoads; ++part) FloatConv7<T>::load_part(window, part, patch);
    FloatConv7<T>::run(patch, 0, taps, load(bias_ + c),
                       [&](int row, int column, Floats v) { emit(c, row, column, v); });
  }

  const T* weight_;
  int64_t channels_;
  bool flip_;
  float *taps_, *bias_;
};

}  // namespace mra::cpu::MRA_ISA
