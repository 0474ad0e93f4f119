// What goes around the library's product of a linear layer with GELU: the activation, its weighted mean, and backward.
//
// Work: runs of rows of a picture to tasks. Forward reads the product and writes the activation; where the library has
// applied it already, only the mean is left. Backward turns the activation's gradient, and its mean's, into the
// product's, and sums the bias's gradient on the way: for each task, then over tasks in order. Bound by memory: 2 or 3
// elements moved each, about 30 and 50 FLOPs.
#include "cpu/gelu.h"
#include "cpu/sums.h"

namespace mra::cpu::MRA_ISA {
namespace {

// Tasks of a picture.
constexpr int64_t kTasks = 16;

// Runs visit(b, first, last, sums) for runs of positions; sums: [padded], zeros, one for each run, in `partial`.
template <class Visit>
inline void for_each_run(int64_t batch, int64_t positions, int64_t padded, int threads, float* partial, Visit visit) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < batch * kTasks; ++task) {
    const int64_t part = task % kTasks;
    float* sums = partial == nullptr ? nullptr : partial + task * padded;
    if (sums != nullptr) std::memset(sums, 0, padded * sizeof(float));
    visit(task / kTasks, positions * part / kTasks, positions * (part + 1) / kTasks, sums);
  }
}

template <class T>
void forward(const LinearGeluForward& a) {
  const int64_t padded = round_up(a.channels, kLanes);
  Scratch<float> partial(a.mean_weights == nullptr ? 0 : a.batch * kTasks * padded);
  float* sums_of_all = a.mean_weights == nullptr ? nullptr : partial.get();
  for_each_run(a.batch, a.positions, padded, a.place.threads, sums_of_all,
               [&](int64_t b, int64_t first, int64_t last, float* sums) {
                 for (int64_t l = first; l < last; ++l) {
                   const int64_t row = (b * a.positions + l) * a.channels;
                   T* y = static_cast<T*>(a.y) + row;
                   if (a.product != nullptr) {
                     const T* product = static_cast<const T*>(a.product) + row;
                     for_each_vector(a.channels, [&](int64_t c, int64_t lanes) {
                       store_first(y + c, gelu(load_first(product + c, lanes)), lanes);
                     });
                   }
                   if (sums == nullptr) continue;
                   const float weight = a.mean_weights[l];
                   for_each_vector(a.channels, [&](int64_t c, int64_t lanes) {
                     store(sums + c, load(sums + c) + weight * load_first(y + c, lanes));
                   });
                 }
               });
  if (a.mean_weights == nullptr) return;
  for (int64_t b = 0; b < a.batch; ++b) {
    sum_tasks(partial.get() + b * kTasks * padded, kTasks, padded, a.channels, a.y_mean + b * a.channels);
  }
}

template <class T>
void backward(const LinearGeluBackward& a) {
  const int64_t padded = round_up(a.channels, kLanes), tasks = a.batch * kTasks;
  Scratch<float> partial(tasks * padded);
  for_each_run(a.batch, a.positions, padded, a.place.threads, partial.get(),
               [&](int64_t b, int64_t first, int64_t last, float* sums) {
                 for (int64_t l = first; l < last; ++l) {
                   const int64_t row = (b * a.positions + l) * a.channels;
                   const float weight = a.grad_y_mean == nullptr ? 0.0f : a.mean_weights[l];
                   for_each_vector(a.channels, [&](int64_t c, int64_t lanes) {
                     Floats g = {};
                     if (a.grad_y != nullptr) g = load_first(static_cast<const T*>(a.grad_y) + row + c, lanes);
                     if (a.grad_y_mean != nullptr) {
                       g += weight * load_first(a.grad_y_mean + b * a.channels + c, lanes);
                     }
                     g *= gelu_slope(load_first(static_cast<const T*>(a.product) + row + c, lanes));
                     store(sums + c, load(sums + c) + g);
                     store_first(static_cast<T*>(a.grad_product) + row + c, g, lanes);
                   });
                 }
               });
  sum_tasks(partial.get(), tasks, padded, a.channels, static_cast<T*>(a.grad_bias));
}

}  // namespace

void linear_gelu_forward(const LinearGeluForward& a) {
  with_type(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

void linear_gelu_backward(const LinearGeluBackward& a) {
  with_type(a.dtype, [&](auto element) { backward<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
