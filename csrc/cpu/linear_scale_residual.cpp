// What goes around the library's product of a linear layer with scale and residual: residual + scale * product, and
// backward.
//
// Work: runs of rows to threads, vectors of channels inside. Forward fuses scale and sum, which eager does in two
// passes with two fresh tensors. Backward scales the gradient for the products and sums the bias's and the scale's
// gradients on the way: for each task, then over tasks in order. 3 elements moved each, 2 and 5 FLOPs: bound by memory.
#include "cpu/sums.h"

namespace mra::cpu::MRA_ISA {
namespace {

constexpr int64_t kTasks = 32;

template <class T>
void forward(const LinearScaleResidualForward& a) {
  const T* scale = static_cast<const T*>(a.scale);
#pragma omp parallel for num_threads(a.place.threads)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* product = static_cast<const T*>(a.product) + row * a.channels;
    const T* residual = static_cast<const T*>(a.residual) + row * a.channels;
    T* y = static_cast<T*>(a.y) + row * a.channels;
    for_each_vector(a.channels, [&](int64_t c, int64_t lanes) {
      const Floats scaled = load_first(scale + c, lanes) * load_first(product + c, lanes);
      store_first(y + c, load_first(residual + c, lanes) + scaled, lanes);
    });
  }
}

template <class T>
void backward(const LinearScaleResidualBackward& a) {
  const int64_t padded = round_up(a.channels, kLanes), stride = 2 * padded, tasks = smaller(kTasks, a.rows);
  const T* scale = static_cast<const T*>(a.scale);
  Scratch<float> partial(tasks * stride);
  std::memset(partial.get(), 0, tasks * stride * sizeof(float));
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.place.threads)
  for (int64_t task = 0; task < tasks; ++task) {
    float *bias_sums = partial.get() + task * stride, *scale_sums = bias_sums + padded;
    for (int64_t row = a.rows * task / tasks; row < a.rows * (task + 1) / tasks; ++row) {
      const int64_t offset = row * a.channels;
      for_each_vector(a.channels, [&](int64_t c, int64_t lanes) {
        const Floats g = load_first(static_cast<const T*>(a.grad_y) + offset + c, lanes);
        const Floats scaled = g * load_first(scale + c, lanes);
        store_first(static_cast<T*>(a.grad_product) + offset + c, scaled, lanes);
        store(bias_sums + c, load(bias_sums + c) + scaled);
        if (a.product == nullptr) return;
        const Floats product = load_first(static_cast<const T*>(a.product) + offset + c, lanes);
        store(scale_sums + c, load(scale_sums + c) + g * product);
      });
    }
  }
  sum_tasks(partial.get(), tasks, stride, a.channels, static_cast<T*>(a.grad_bias));
  sum_tasks(partial.get() + padded, tasks, stride, a.channels, static_cast<T*>(a.grad_scale));
}

}  // namespace

void linear_scale_residual_forward(const LinearScaleResidualForward& a) {
  with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

void linear_scale_residual_backward(const LinearScaleResidualBackward& a) {
  with_type(a.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
