// Gradients of a depthwise 7x7 convolution, from the gradient of its output: of its input, and of its taps.
#pragma once

#include "cpu/depthwise_conv7.h"

namespace mra::cpu::MRA_ISA {

// Tasks of the taps' gradient: enough for many threads, and fixed, so that the order of its sums is.
constexpr int64_t kGradientTasks = 64;

// sums[49, kLanes] += grad [8, 8, kLanes] correlated with patch [14, 14, kLanes]; before row i of taps comes before(i).
template <class Before>
inline void correlate_patch(const float* patch, const float* grad, float* sums, Before before) {
  for (int i = 0; i < kTaps; ++i) {
    before(i);
    Floats acc[kTaps] = {};
    for (int row = 0; row < kTile; ++row) {
      Floats g[kTile];
#pragma GCC unroll 8
      for (int o = 0; o < kTile; ++o) g[o] = load(grad + (row * kTile + o) * kLanes);
      const float* input = patch + (row + i) * kPatch * kLanes;
#pragma GCC unroll 14
      for (int j = 0; j < kPatch; ++j) {
        const Floats v = load(input + j * kLanes);
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

// grad: [B, H, W, C] -> grad_x: the same, grad convolved with the flipped taps, plus `constant`: [B, padded], or null.
template <class T>
void input_gradient(const Map<const T>& grad, const void* weight, const float* constant, int threads, T* grad_x) {
  const Convolution<T> convolution(weight, nullptr, grad.channels, true, threads);
  const Map<T> out{grad_x, grad.batch, grad.height, grad.width, grad.channels};
  for_each_tile(grad, row_tasks(grad, threads), threads, [&](int64_t, const Tile& tile) {
    convolution.run_tile(grad, tile, [&](int64_t c, int row, int column, Floats v) {
      if (row >= tile.rows || column >= tile.columns) return;
      if (constant != nullptr) v += load(constant + tile.b * grad.padded() + c);
      store_first(out.pixel(tile.b, tile.y + row, tile.x + column) + c, v, grad.channels - c);
    });
  });
}

// x, grad: [B, H, W, C] -> grad_weight: [C, 49]. A task has one vector of channels and a band of tile rows of a
// picture.
template <class T>
void weight_gradient(const Map<const T>& x, const Map<const T>& grad, int threads, T* grad_weight) {
  constexpr int64_t kSize = kAllTaps * kLanes;
  const int64_t groups = x.padded() / kLanes, rows = x.batch * x.tiles_y();
  const int64_t bands = smaller(rows, (kGradientTasks + groups - 1) / groups);
  Scratch<float> partial(groups * bands * kSize);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < groups * bands; ++task) {
    const int64_t c = task / bands * kLanes, band = task % bands;
    alignas(64) float patch[kPatch * kPatch * kLanes], tile_grad[kTile * kTile * kLanes];
    float* sums = partial.get() + task * kSize;
    std::memset(sums, 0, kSize * sizeof(float));
    for (int64_t i = rows * band / bands * x.tiles_x(); i < rows * (band + 1) / bands * x.tiles_x(); ++i) {
      const Tile tile = tile_at(x, i);
      const Window<T> inputs(x, tile, kPad, c), outputs(grad, tile, 0, c);
      for (int64_t row = 0; row < kPatch; ++row) load_row<kPatch>(inputs, row, patch + row * kPatch * kLanes);
      for (int64_t row = 0; row < kTile; ++row) load_row<kTile>(outputs, row, tile_grad + row * kTile * kLanes);
      const Tile right{tile.b, tile.y, tile.x + kTile, tile.rows, smaller(kTile, x.width - tile.x - kTile)};
      correlate_patch(patch, tile_grad, sums, [&](int i) {
        for (int64_t row = 2 * i; row < 2 * i + 2; ++row) {
          fetch_row(grad, right, row, c);
          if (!inputs.has_row(row)) continue;
          for (int64_t j = kPatch; j < kPatch + right.columns - kPad; ++j) fetch(inputs.pixel(row, j));
        }
      });
    }
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t lane = 0; lane < smaller(kLanes, x.channels - group * kLanes); ++lane) {
      T* out = grad_weight + (group * kLanes + lane) * kAllTaps;
      for (int t = 0; t < kAllTaps; ++t) {
        float total = 0;
        for (int64_t band = 0; band < bands; ++band) {
          total += partial.get()[(group * bands + band) * kSize + t * kLanes + lane];
        }
        store_first(out + t, broadcast(total), 1);
      }
    }
  }
}

}  // namespace mra::cpu::MRA_ISA
