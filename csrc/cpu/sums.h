// Sums over tasks in the tasks' order: they repeat bit for bit, whatever the number of threads.
#pragma once

#include "cpu/vector.h"

namespace mra::cpu::MRA_ISA {

// partial: [tasks, ...], a block of `stride` floats for each task -> out: [n], the sum of the blocks' first n floats.
// A null `out` is left alone.
template <class T>
inline void sum_tasks(const float* partial, int64_t tasks, int64_t stride, int64_t n, T* out) {
  if (out == nullptr) return;
  for_each_vector(n, [&](int64_t i, int64_t lanes) {
    Floats total = {};
    for (int64_t task = 0; task < tasks; ++task) total += load_first(partial + task * stride + i, lanes);
    store_first(out + i, total, lanes);
  });
}

}  // namespace mra::cpu::MRA_ISA
