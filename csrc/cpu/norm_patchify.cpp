// LayerNorm over the channels, written as rows of 2x2 patches, forward and backward, channels last.
//
// Work: runs of pixel rows to tasks. A pixel's place in its patch row is another address for the same C elements, so
// patchifying costs nothing: the map is read once and written once, which bounds it by memory. Backward is LayerNorm's,
// reading its gradient at that address; the norm's own gradients are summed for each task, then over tasks in order.
#include "cpu/layer_norm.h"
#include "cpu/sums.h"

namespace mra::cpu::MRA_ISA {
namespace {

constexpr int64_t kTasks = 32;
constexpr int64_t kTogether = 8;  // pixels of a row

// A map [B, H, W, C] and where its pixels lie in the patch rows [B, H / 2, W / 2, 4, C].
struct Patches {
  int64_t batch, height, width, channels;

  int64_t rows() const { return batch * height; }
  // The last row and column of an odd map belong to no patch.
  bool holds(int64_t row, int64_t x) const { return row % height < height / 2 * 2 && x < width / 2 * 2; }
  // Offset of pixel x of row b * H + y.
  int64_t offset(int64_t row, int64_t x) const {
    const int64_t b = row / height, y = row % height;
    return (((b * (height / 2) + y / 2) * (width / 2) + x / 2) * 4 + y % 2 * 2 + x % 2) * channels;
  }
};

template <class T>
void forward(const NormPatchifyForward& a) {
  const Patches patches{a.batch, a.height, a.width, a.channels};
  const int64_t padded = round_up(a.channels, kLanes);
  float *scale = thread_buffer<struct Scale>(padded), *shift = thread_buffer<struct Shift>(padded);
  pack_vector(static_cast<const T*>(a.norm_weight), scale, a.channels);
  pack_vector(static_cast<const T*>(a.norm_bias), shift, a.channels);
  T* y = static_cast<T*>(a.y);
  const bool streams = worth_streaming(y, patches.rows() * a.width, a.channels);
#pragma omp parallel for num_threads(a.place.threads)
  for (int64_t row = 0; row < patches.rows(); ++row) {
    for (int64_t first = 0; first < a.width; first += kTogether) {
      const int64_t count = smaller(kTogether, a.width - first), pixel = row * a.width + first;
      const T* values = static_cast<const T*>(a.x) + pixel * a.channels;
      Statistics s[kTogether];
      row_statistics(values, count, a.channels, kLanes, a.channels, a.eps, s);
      for (int64_t i = 0; i < count; ++i) {
        a.mean[pixel + i] = s[i].mean;
        a.rstd[pixel + i] = s[i].rstd;
        fetch(values + (kTogether + i) * a.channels, a.channels);
        if (!patches.holds(row, first + i)) continue;
        normalize(values + i * a.channels, kLanes, s[i], scale, shift, a.channels, streams,
                  y + patches.offset(row, first + i));
      }
    }
    finish_streams();
  }
}

template <class T>
void backward(const NormPatchifyBackward& a) {
  const Patches patches{a.batch, a.height, a.width, a.channels};
  const int64_t padded = round_up(a.channels, kLanes), stride = NormSums::kRows * padded;
  const int64_t tasks = smaller(kTasks, patches.rows());
  T* grad_x = static_cast<T*>(a.grad_x);
  const bool streams = grad_x != nullptr && worth_streaming(grad_x, patches.rows() * a.width, a.channels);
  float* scale = thread_buffer<struct Scale>(padded);
  pack_vector(static_cast<const T*>(a.norm_weight), scale, a.channels);
  Scratch<float> partial(tasks * stride);
  Scratch<T> unwanted(tasks * round_up(a.channels, 64));
  std::memset(partial.get(), 0, tasks * stride * sizeof(float));
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.place.threads)
  for (int64_t task = 0; task < tasks; ++task) {
    NormSums sums = NormSums::at(partial.get() + task * stride, padded);
    sums.input = nullptr;
    for (int64_t row = patches.rows() * task / tasks; row < patches.rows() * (task + 1) / tasks; ++row) {
      for (int64_t x = 0; x < a.width; ++x) {
        const int64_t pixel = row * a.width + x;
        T* grad = grad_x != nullptr ? grad_x + pixel * a.channels : unwanted.get() + task * round_up(a.channels, 64);
        if (!patches.holds(row, x)) {
          std::memset(grad, 0, a.channels * sizeof(T));
          continue;
        }
        const T* grad_y = static_cast<const T*>(a.grad_y);
        const T* values = static_cast<const T*>(a.x) + pixel * a.channels;
        fetch(grad_y + patches.offset(row, x + kTogether), a.channels);
        fetch(values + kTogether * a.channels, a.channels);
        normalize_backward(grad_y + patches.offset(row, x), values, kLanes, Statistics{a.mean[pixel], a.rstd[pixel]},
                           scale, a.channels, sums, streams, grad);
      }
    }
    finish_streams();
  }
  const NormSums sums = NormSums::at(partial.get(), padded);
  sum_tasks(sums.weight, tasks, stride, a.channels, static_cast<T*>(a.grad_norm_weight));
  sum_tasks(sums.bias, tasks, stride, a.channels, static_cast<T*>(a.grad_norm_bias));
}

}  // namespace

void norm_patchify_forward(const NormPatchifyForward& a) {
  with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

void norm_patchify_backward(const NormPatchifyBackward& a) {
  with_type(a.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
