// A channels-last map in tiles of 8x8 pixels: dealt to threads, and the inputs of a tile's 7x7 convolution.
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

// Runs visit(task, first, end) for every task, which has the tiles of indices first to end - 1. Tiles are dealt to
// tasks whatever the number of threads, and a task visits its own in order, so that a sum kept for each task repeats
// bit for bit.
template <class T, class Visit>
inline void for_each_task(const Map<T>& map, int64_t tasks, int threads, Visit visit) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    visit(task, map.tiles() * task / tasks, map.tiles() * (task + 1) / tasks);
  }
}

// Runs visit(task, tile) for every tile.
template <class T, class Visit>
inline void for_each_tile(const Map<T>& map, int64_t tasks, int threads, Visit visit) {
  for_each_task(map, tasks, threads, [&](int64_t task, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) visit(task, tile_at(map, i));
  });
}

// Fetches the group of channels from c on of a tile's row, if the map has it.
template <class T>
__attribute__((always_inline)) inline void fetch_row(const Map<const T>& map, const Tile& tile, int64_t row,
                                                     int64_t c) {
  if (row >= tile.rows) return;
  const T* first = map.pixel(tile.b, tile.y + row, tile.x) + c;
  for (int64_t column = 0; column < tile.columns; ++column) fetch(first + column * map.channels);
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
inline void load_row(const Window<T>& window, int64_t i, float* out) {
  if (!window.has_row(i)) {
    std::memset(out, 0, kSize * kLanes * sizeof(float));
    return;
  }
  const T* row = window.pixel(i, 0);
  if (window.lanes >= kLanes) {
    window.template for_each_column<kSize>(
        [&](int64_t j, bool inside) { store(out + j * kLanes, inside ? load(row + j * window.channels) : Floats{}); });
  } else {
    window.template for_each_column<kSize>([&](int64_t j, bool inside) {
      store(out + j * kLanes, inside ? load_first(row + j * window.channels, window.lanes) : Floats{});
    });
  }
}

}  // namespace mra::cpu::MRA_ISA
