// Convolution k x k with stride k + bias + LayerNorm over the channels, from channels-first pixels to a channels-last
// map; and the norm's backward.
//
// Work: runs of 8 patches of a row to threads. Their pixels are gathered once to [K, 8] floats, K = P k^2, and
// multiplied with the packed weight [C / (2 lanes), K, 2 lanes]: each step of K is two loads of weights and 8
// broadcasts for 16 multiply-adds into registers. The outputs stay in a buffer of 8 * C floats in the first-level cache
// for the norm. The picture is read once and the map written once; 2 K FLOPs an element (K = 48 for ConvNeXt) bind it
// by the multiply-adds.
//
// Backward gets the convolution's output; the convolution's own gradients are matrix products, the library's.
#include "cpu/layer_norm.h"
#include "cpu/multiply.h"
#include "cpu/sums.h"

namespace mra::cpu::MRA_ISA {
namespace {

constexpr int64_t kPixels = 8;
constexpr int64_t kVectors = 2;
constexpr int64_t kGroup = kVectors * kLanes;
constexpr int64_t kTasks = 32;

// weight: [C, K] -> packed: [C / kGroup, K, kGroup], zero in the padding.
template <class T>
void pack_weight(const T* weight, int64_t channels, int64_t depth, int threads, float* packed) {
#pragma omp parallel for num_threads(threads)
  for (int64_t group = 0; group < round_up(channels, kGroup) / kGroup; ++group) {
    float* out = packed + group * depth * kGroup;
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      const int64_t c = group * kGroup + lane;
      for (int64_t k = 0; k < depth; ++k) out[k * kGroup + lane] = c < channels ? load_one(weight + c * depth + k) : 0;
    }
  }
}

// The pixels of up to kPixels patches from column x on of a row of patches -> rows: [K, kPixels].
template <class T>
inline void gather(const PatchConvNormForward& a, int64_t b, int64_t y, int64_t x, int64_t count, float* rows) {
  const T* pixels = static_cast<const T*>(a.pixels);
  for (int64_t p = 0; p < a.planes; ++p) {
    for (int64_t dy = 0; dy < a.patch; ++dy) {
      const T* row = pixels + ((b * a.planes + p) * a.height + y * a.patch + dy) * a.width + x * a.patch;
      for (int64_t dx = 0; dx < a.patch; ++dx, rows += kPixels) {
        for (int64_t i = 0; i < kPixels; ++i) rows[i] = i < count ? load_one(row + i * a.patch + dx) : 0;
      }
    }
  }
}

template <class T>
void forward(const PatchConvNormForward& a) {
  const int64_t grid_y = a.height / a.patch, grid_x = a.width / a.patch;
  const int64_t depth = a.planes * a.patch * a.patch, padded = round_up(a.channels, kGroup);
  float* weight = thread_buffer<struct Weight>(padded * depth);
  float* bias = thread_buffer<struct Bias>(padded);
  float *scale = thread_buffer<struct Scale>(padded), *shift = thread_buffer<struct Shift>(padded);
  pack_weight(static_cast<const T*>(a.weight), a.channels, depth, a.place.threads, weight);
  std::memset(bias, 0, padded * sizeof(float));
  pack_vector(static_cast<const T*>(a.bias), bias, a.channels);
  pack_vector(static_cast<const T*>(a.norm_weight), scale, a.channels);
  pack_vector(static_cast<const T*>(a.norm_bias), shift, a.channels);
  T* y = static_cast<T*>(a.y);
  const bool streams = worth_streaming(y, a.batch * grid_y * grid_x, a.channels);
#pragma omp parallel for num_threads(a.place.threads)
  for (int64_t row = 0; row < a.batch * grid_y; ++row) {
    float *rows = thread_buffer<struct Rows>(depth * kPixels), *conv = thread_buffer<struct Outputs>(kPixels * padded);
    for (int64_t x = 0; x < grid_x; x += kPixels) {
      const int64_t count = smaller(kPixels, grid_x - x);
      gather<T>(a, row / grid_y, row % grid_y, x, count, rows);
      for (int64_t c = 0; c < padded; c += kGroup)
        multiply<float, kPixels, kVectors>(
            rows, 1, kPixels, weight + c * depth, kGroup, depth,
            [&](int, int v) { return load(bias + c + v * kLanes); },
            [&](int i, int v, Floats sum) { store(conv + i * padded + c + v * kLanes, sum); });
      Statistics s[kPixels];
      row_statistics(conv, count, padded, kLanes, a.channels, a.eps, s);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t pixel = row * grid_x + x + i;
        normalize(conv + i * padded, kLanes, s[i], scale, shift, a.channels, streams, y + pixel * a.channels);
        a.mean[pixel] = s[i].mean;
        a.rstd[pixel] = s[i].rstd;
      }
    }
    finish_streams();
  }
}

template <class T>
void backward(const PatchConvNormBackward& a) {
  const int64_t padded = round_up(a.channels, kLanes), stride = NormSums::kRows * padded;
  const int64_t tasks = smaller(kTasks, a.rows);
  const bool streams = worth_streaming(static_cast<const T*>(a.grad_conv), a.rows, a.channels);
  float* scale = thread_buffer<struct Scale>(padded);
  pack_vector(static_cast<const T*>(a.norm_weight), scale, a.channels);
  Scratch<float> partial(tasks * stride);
  std::memset(partial.get(), 0, tasks * stride * sizeof(float));
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.place.threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const NormSums sums = NormSums::at(partial.get() + task * stride, padded);
    const int64_t end = a.rows * (task + 1) / tasks;
    for (int64_t row = a.rows * task / tasks; row < end; row += kPixels) {
      const int64_t count = smaller(kPixels, end - row);
      const T* grad_y = static_cast<const T*>(a.grad_y) + row * a.channels;
      const T* conv = static_cast<const T*>(a.conv) + row * a.channels;
      T* grad_conv = static_cast<T*>(a.grad_conv) + row * a.channels;
      Statistics s[kPixels];
      row_statistics(conv, count, a.channels, kLanes, a.channels, a.eps, s);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t offset = i * a.channels, ahead = (kPixels + i) * a.channels;
        fetch(grad_y + ahead, a.channels);
        fetch(conv + ahead, a.channels);
        normalize_backward(grad_y + offset, conv + offset, kLanes, s[i], scale, a.channels, sums, streams,
                           grad_conv + offset);
      }
    }
    finish_streams();
  }
  const NormSums sums = NormSums::at(partial.get(), padded);
  sum_tasks(sums.weight, tasks, stride, a.channels, static_cast<T*>(a.grad_norm_weight));
  sum_tasks(sums.bias, tasks, stride, a.channels, static_cast<T*>(a.grad_norm_bias));
  sum_tasks(sums.input, tasks, stride, a.channels, static_cast<T*>(a.grad_bias));
}

}  // namespace

void patch_conv_norm_forward(const PatchConvNormForward& a) {
  with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

void patch_conv_norm_backward(const PatchConvNormBackward& a) {
  with_type(a.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
