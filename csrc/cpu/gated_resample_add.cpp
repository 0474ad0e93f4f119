// low + gate * resample(high), channels last: average pool, same grid, or bilinear with aligned corners.
//
// Work: a row of the low grid is one task. Each pixel is a loop over vectors of channels.
// Fused: the resampling, the gate and the sum; low and high are read once and the output written once (3 * C elements
// a pixel on one grid), which bounds it by memory. Backward gathers what reads each high-resolution pixel, in the
// same pass as the gate's gradient where a pixel has one reader; that is summed for each row in float32, then over
// rows.
#include "common/resample.h"
#include "cpu/vector.h"

namespace mra::cpu::MRA_ISA {
namespace {

// The high-resolution map, and how a low-resolution pixel reads it.
template <class T>
struct High {
  const T* data;  // [B, H', W', C]
  int64_t height, width, channels;
  int64_t window_y, window_x;  // pooling window; 0 where the map is resized bilinearly
  float scale_y, scale_x;

  High(const void* high, int64_t h, int64_t w, int64_t c, int64_t low_height, int64_t low_width)
      : data(static_cast<const T*>(high)),
        height(h),
        width(w),
        channels(c),
        window_y(h % low_height == 0 && w % low_width == 0 ? h / low_height : 0),
        window_x(window_y != 0 ? w / low_width : 0),
        scale_y(bilinear_scale(h, low_height)),
        scale_x(bilinear_scale(w, low_width)) {}

  const T* pixel(int64_t b, int64_t y, int64_t x) const { return data + ((b * height + y) * width + x) * channels; }

  // Calls use(c, value) for every vector of channels of the pixel that low-resolution (b, y, x) sees.
  template <class Use>
  void read(int64_t b, int64_t y, int64_t x, Use use) const {
    if (window_y == 1 && window_x == 1) {
      const T* p = pixel(b, y, x);
      for (int64_t c = 0; c < channels; c += kLanes) {
        fetch(p + c + channels);
        use(c, load_first(p + c, channels - c));
      }
    } else if (window_y > 0) {
      const float weight = 1.0f / static_cast<float>(window_y * window_x);
      for (int64_t c = 0; c < channels; c += kLanes) {
        Floats total = {};
        for (int64_t i = 0; i < window_y; ++i) {
          for (int64_t j = 0; j < window_x; ++j) {
            const T* p = pixel(b, y * window_y + i, x * window_x + j) + c;
            fetch(p + window_x * channels);
            total += load_first(p, channels - c);
          }
        }
        use(c, total * weight);
      }
    } else {
      const Bilinear v = bilinear(y, height, scale_y), h = bilinear(x, width, scale_x);
      const T *p00 = pixel(b, v.first, h.first), *p01 = pixel(b, v.first, h.second);
      const T *p10 = pixel(b, v.second, h.first), *p11 = pixel(b, v.second, h.second);
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t lanes = channels - c;
        const Floats top = load_first(p00 + c, lanes) * (1 - h.fraction) + load_first(p01 + c, lanes) * h.fraction;
        const Floats bottom = load_first(p10 + c, lanes) * (1 - h.fraction) + load_first(p11 + c, lanes) * h.fraction;
        use(c, top * (1 - v.fraction) + bottom * v.fraction);
      }
    }
  }
};

template <class T>
void forward(const GatedResampleAddForward& a) {
  const High<T> high(a.high, a.high_height, a.high_width, a.channels, a.height, a.width);
#pragma omp parallel for num_threads(a.place.threads)
  for (int64_t row = 0; row < a.batch * a.height; ++row) {
    const int64_t b = row / a.height;
    const float gate = a.gate[b];
    for (int64_t x = 0; x < a.width; ++x) {
      const T* low = static_cast<const T*>(a.low) + (row * a.width + x) * a.channels;
      T* y = static_cast<T*>(a.y) + (row * a.width + x) * a.channels;
      high.read(b, row % a.height, x, [&](int64_t c, Floats value) {
        fetch(low + c + a.channels);
        store_first(y + c, load_first(low + c, a.channels - c) + gate * value, a.channels - c);
      });
    }
  }
}

// Both gradients where `high` is pooled or on the same grid, in one pass over a row of the low grid: each
// high-resolution pixel has one reader. Returns the row's part of the gate's gradient.
template <class T>
float pooled_gradients(const GatedResampleAddBackward& a, const High<T>& high, int64_t row) {
  const int64_t b = row / a.height, y = row % a.height * high.window_y;
  const float share = 1.0f / static_cast<float>(high.window_y * high.window_x), weight = a.gate[b] * share;
  Floats total = {};
  for (int64_t x = 0; x < a.width; ++x) {
    const T* grad = static_cast<const T*>(a.grad_y) + (row * a.width + x) * a.channels;
    for (int64_t i = 0; i < high.window_y; ++i) {
      for (int64_t j = 0; j < high.window_x; ++j) {
        const T* p = high.pixel(b, y + i, x * high.window_x + j);
        T* out = a.grad_high == nullptr ? nullptr : static_cast<T*>(a.grad_high) + (p - high.data);
        for_each_vector(a.channels, [&](int64_t c, int64_t lanes) {
          const Floats g = load_first(grad + c, lanes);
          if (out != nullptr) store_first(out + c, g * weight, lanes);
          if (a.grad_gate != nullptr) total += g * load_first(p + c, lanes);
        });
      }
    }
  }
  return sum(total) * share;
}

// The high-resolution map's gradient where it is resized bilinearly: a pixel gathers from those that read it.
template <class T>
void bilinear_gradient(const GatedResampleAddBackward& a, const High<T>& high, int64_t b, int64_t y, int64_t x) {
  const Range rows = bilinear_readers(y, a.height, high.scale_y), columns = bilinear_readers(x, a.width, high.scale_x);
  const int64_t padded = round_up(a.channels, kLanes);
  float* total = thread_buffer<struct Total>(padded);
  std::memset(total, 0, padded * sizeof(float));
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float weight_y = bilinear_weight(bilinear(i, high.height, high.scale_y), y);
    if (weight_y == 0.0f) continue;
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      const float weight = weight_y * bilinear_weight(bilinear(j, high.width, high.scale_x), x);
      if (weight == 0.0f) continue;
      const T* grad = static_cast<const T*>(a.grad_y) + ((b * a.height + i) * a.width + j) * a.channels;
      for_each_vector(a.channels, [&](int64_t c, int64_t lanes) {
        store(total + c, load(total + c) + weight * load_first(grad + c, lanes));
      });
    }
  }
  T* out = static_cast<T*>(a.grad_high) + (high.pixel(b, y, x) - high.data);
  for_each_vector(a.channels,
                  [&](int64_t c, int64_t lanes) { store_first(out + c, load(total + c) * a.gate[b], lanes); });
}

// The same row's part of the gate's gradient.
template <class T>
float bilinear_gate(const GatedResampleAddBackward& a, const High<T>& high, int64_t row) {
  Floats total = {};
  for (int64_t x = 0; x < a.width; ++x) {
    const T* grad = static_cast<const T*>(a.grad_y) + (row * a.width + x) * a.channels;
    high.read(row / a.height, row % a.height, x,
              [&](int64_t c, Floats value) { total += value * load_first(grad + c, a.channels - c); });
  }
  return sum(total);
}

template <class T>
void backward(const GatedResampleAddBackward& a) {
  const High<T> high(a.high, a.high_height, a.high_width, a.channels, a.height, a.width);
  const bool pooled = high.window_y > 0;
#pragma omp parallel num_threads(a.place.threads)
  {
    if (pooled || a.grad_gate != nullptr) {
#pragma omp for nowait
      for (int64_t row = 0; row < a.batch * a.height; ++row) {
        const float of_row = pooled ? pooled_gradients(a, high, row) : bilinear_gate(a, high, row);
        if (a.grad_gate != nullptr) a.partial[row] = of_row;
      }
    }
    if (!pooled && a.grad_high != nullptr) {
#pragma omp for
      for (int64_t row = 0; row < a.batch * a.high_height; ++row) {
        for (int64_t x = 0; x < a.high_width; ++x) {
          bilinear_gradient(a, high, row / a.high_height, row % a.high_height, x);
        }
      }
    }
  }
  if (a.grad_gate == nullptr) return;
  for (int64_t b = 0; b < a.batch; ++b) {
    double total = 0;
    for (int64_t y = 0; y < a.height; ++y) total += a.partial[b * a.height + y];
    a.grad_gate[b] = static_cast<float>(total);
  }
}

}  // namespace

void gated_resample_add_forward(const GatedResampleAddForward& a) {
  with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

void gated_resample_add_backward(const GatedResampleAddBackward& a) {
  with_type(a.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
