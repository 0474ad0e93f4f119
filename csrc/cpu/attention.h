// What attention's forward and backward share: heads as units for small products, and the scores of a block.
#pragma once

#include <math.h>

#include "cpu/exp.h"
#include "cpu/multiply.h"

namespace mra::cpu::MRA_ISA {

// Queries and keys of a block, multiples of what `multiply` takes at once. Scores of a block stay in the second-level
// cache.
constexpr int kBlockQueries = 8 * kSumRows;
constexpr int kBlockKeys = 512;
static_assert(kBlockKeys % kSumLanes == 0 && kBlockKeys % kSumRows == 0);

// One head of one picture: rows of `channels`, `stride` apart.
template <class T>
struct HeadRows {
  const T* data;
  int64_t count, stride, channels;

  const T* row(int64_t i) const { return data + i * stride; }

  HeadRows from(int64_t first, int64_t most) const {
    return {row(first), smaller(most, count - first), stride, channels};
  }
};

// tensor: [B, rows, H, D], rows a stride apart.
template <class T>
inline HeadRows<T> head_rows(const void* tensor, int64_t b, int64_t h, int64_t rows, int64_t stride, int64_t channels) {
  return {static_cast<const T*>(tensor) + b * rows * stride + h * channels, rows, stride, channels};
}

// Channels of a row of units, and its units; what lies between them and the channels is zero.
inline int64_t padded(int64_t channels) { return round_up(channels, kLanes); }
template <class T>
inline int64_t row_units(int64_t channels) {
  return padded(channels) / Units<T>::kCount;
}

// -> units of channels: [count, row_units], the left side of products over channels.
template <class T>
inline void pack_rows(const HeadRows<T>& rows, float* units) {
  for (int64_t i = 0; i < rows.count; ++i) {
    float* row = units + i * row_units<T>(rows.channels);
    for_each_vector(rows.channels,
                    [&](int64_t c, int64_t lanes) { Units<T>::store_row(row, c, load_first(rows.row(i) + c, lanes)); });
  }
}

// -> the same as panels of columns: [count / kSumLanes, row_units, kSumLanes], the right side of products over
// channels. Columns after the last row are zero.
template <class T>
inline void pack_columns(const HeadRows<T>& rows, float* row, float* panels) {
  const int64_t units = row_units<T>(rows.channels);
  for (int64_t i = 0; i < round_up(rows.count, kSumLanes); ++i) {
    if (i < rows.count)
      pack_rows(rows.from(i, 1), row);
    else
      std::memset(row, 0, units * sizeof(float));
    float* column = panels + i / kSumLanes * kSumLanes * units + i % kSumLanes;
    for (int64_t k = 0; k < units; ++k) column[k * kSumLanes] = row[k];
  }
}

// -> units of rows: [count / Units::kCount, padded], the right side of products over rows.
template <class T>
inline void pack_depths(const HeadRows<T>& rows, float* units) {
  const int64_t width = padded(rows.channels);
  for (int64_t i = 0; i < rows.count; i += 2) {
    float* unit = units + i / Units<T>::kCount * width;
    for_each_vector(rows.channels, [&](int64_t c, int64_t lanes) {
      const Floats second = i + 1 < rows.count ? load_first(rows.row(i + 1) + c, lanes) : Floats{};
      Units<T>::store_rows(unit + c, width, load_first(rows.row(i) + c, lanes), second);
    });
  }
}

// scale * rows columns^T of a block: rows: [count, units]; panels of columns from number `first`, a multiple of
// kSumLanes; products: [count, kBlockKeys].
template <class T>
inline void score(const float* rows, int64_t count, const float* panels, int64_t first, int64_t columns, int64_t units,
                  float scale, float* products) {
  for_each_run(round_up(columns, kLanes), [&](int64_t j, auto vectors) {
    for (int64_t i = 0; i < count; i += kSumRows) {
      multiply<T, kSumRows, vectors.value>(
          rows + i * units, units, 1, panels + (first + j) * units, kSumLanes, units, [](int, int) { return Floats{}; },
          [&](int row, int v, Floats sum) { store(products + (i + row) * kBlockKeys + j + v * kLanes, scale * sum); });
    }
  });
}

// sums = factor(row) * sums + left right; left: [rows, depths] units, right: [depths, width] units, sums: [rows,
// width].
template <class T, class Factor>
inline void add_product(const float* left, int64_t row_stride, int64_t depth_stride, const float* right, int64_t depths,
                        int64_t rows, int64_t width, float* sums, Factor factor) {
  for_each_run(width, [&](int64_t c, auto vectors) {
    for (int64_t i = 0; i < rows; i += kSumRows) {
      float* out = sums + i * width + c;
      multiply<T, kSumRows, vectors.value>(
          left + i * row_stride, row_stride, depth_stride, right + c, width, depths,
          [&](int row, int v) { return factor(i + row) * load(out + row * width + v * kLanes); },
          [&](int row, int v, Floats sum) { store(out + row * width + v * kLanes, sum); });
    }
  });
}

// Scores of columns that are none, which then have no share.
inline void mask(float* scores, int64_t columns) {
  for (int64_t j = columns; j < round_up(columns, kLanes); ++j) scores[j] = -INFINITY;
}

}  // namespace mra::cpu::MRA_ISA
