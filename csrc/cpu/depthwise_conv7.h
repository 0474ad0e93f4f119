// Depthwise 7x7 convolution over a channels-last map, by tiles of 8x8 outputs and one vector of channels at a time.
//
// The 14x14 inputs of a tile are first copied to a patch of floats in the first-level cache: that widens them once,
// puts zeros outside the map, and undoes the stride of C elements, which would crowd them into a few cache sets. From
// there a row of taps costs 14 + 7 loads for 56 multiply-adds into 8 accumulators that stay in registers over all seven
// rows.
#pragma once

#include "cpu/vector.h"

namespace mra::cpu::MRA_ISA {

constexpr int kTaps = 7;
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

// The kSize x kSize pixels from (top, left), one vector of channels: [kSize, kSize, kLanes], zero outside the map.
template <int kSize, bool kWhole, class T>
inline void load_patch(const Map<T>& map, int64_t b, int64_t top, int64_t left, int64_t c, Floats* patch) {
  const int64_t first = larger(0, -left), last = smaller(kSize, map.width - left);
  for (int64_t i = 0; i < kSize; ++i, patch += kSize) {
    if (top + i < 0 || top + i >= map.height) {
      std::memset(patch, 0, kSize * sizeof(Floats));
      continue;
    }
    for (int64_t j = 0; j < first; ++j) patch[j] = Floats{};
    const T* p = map.pixel(b, top + i, left + first) + c;
    for (int64_t j = first; j < last; ++j, p += map.channels) {
      patch[j] = kWhole ? load(p) : load_first(p, map.channels - c);
    }
    for (int64_t j = last; j < kSize; ++j) patch[j] = Floats{};
  }
}

template <int kSize, class T>
inline void load_patch(const Map<T>& map, int64_t b, int64_t top, int64_t left, int64_t c, Floats* patch) {
  if (c + kLanes <= map.channels) {
    load_patch<kSize, true>(map, b, top, left, c, patch);
  } else {
    load_patch<kSize, false>(map, b, top, left, c, patch);
  }
}

// weight: [C, 49] -> taps: [padded / kLanes, 49, kLanes], float32, zero in the padding; `flip` turns the taps around,
// for the input's gradient.
template <class T>
inline void pack_taps(const T* weight, float* taps, int64_t channels, bool flip) {
  constexpr int kAll = kTaps * kTaps;
  std::memset(taps, 0, round_up(channels, kLanes) * kAll * sizeof(float));
  for (int64_t c = 0; c < channels; ++c) {
    float* lane = taps + c / kLanes * kAll * kLanes + c % kLanes;
    for (int t = 0; t < kAll; ++t) lane[t * kLanes] = load_one(weight + c * kAll + (flip ? kAll - 1 - t : t));
  }
}

// vector: [C] -> padded: float32, zero in the padding.
template <class T>
inline void pack_vector(const T* vector, float* padded, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes) store(padded + c, load_first(vector + c, channels - c));
}

// Calls emit(row, column, sums) for each of the tile's outputs: start + the convolution. taps: [49, kLanes].
template <class Emit>
inline void conv_patch(const Floats* patch, const float* taps, Floats start, const Tile& tile, Emit emit) {
  for (int row = 0; row < tile.rows; ++row) {
    Floats acc[kTile];
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) acc[o] = start;
    for (int i = 0; i < kTaps; ++i) {
      Floats tap[kTaps];
#pragma GCC unroll 7
      for (int k = 0; k < kTaps; ++k) tap[k] = load(taps + (i * kTaps + k) * kLanes);
      const Floats* input = patch + (row + i) * kPatch;
#pragma GCC unroll 14
      for (int j = 0; j < kPatch; ++j) {
        const Floats v = input[j];
#pragma GCC unroll 7
        for (int k = 0; k < kTaps; ++k) {
          if (j - k >= 0 && j - k < kTile) acc[j - k] += v * tap[k];
        }
      }
    }
    // A whole row is the common case, and constant bounds keep the accumulators in registers.
    if (tile.columns == kTile) {
#pragma GCC unroll 8
      for (int o = 0; o < kTile; ++o) emit(row, o, acc[o]);
    } else {
#pragma GCC unroll 8
      for (int o = 0; o < kTile; ++o) {
        if (o < tile.columns) emit(row, o, acc[o]);
      }
    }
  }
}

// The taps' gradient from one tile: sums[49, kLanes] += grad [8, 8, kLanes] correlated with patch [14, 14, kLanes].
inline void correlate_patch(const Floats* patch, const Floats* grad, float* sums) {
  for (int i = 0; i < kTaps; ++i) {
    Floats acc[kTaps] = {};
    for (int row = 0; row < kTile; ++row) {
      Floats g[kTile];
#pragma GCC unroll 8
      for (int o = 0; o < kTile; ++o) g[o] = grad[row * kTile + o];
      const Floats* input = patch + (row + i) * kPatch;
#pragma GCC unroll 14
      for (int j = 0; j < kPatch; ++j) {
        const Floats v = input[j];
#pragma GCC unroll 7
        for (int k = 0; k < kTaps; ++k) {
          if (j - k >= 0 && j - k < kTile) acc[k] += v * g[j - k];
        }
      }
    }
    for (int k = 0; k < kTaps; ++k) {
      float* s = sums + (i * kTaps + k) * kLanes;
      store(s, load(s) + acc[k]);
    }
  }
}

}  // namespace mra::cpu::MRA_ISA
