// residual + scale * y, in the memory of y, the matrix product that the library has just written.
//
// Work: runs of rows to threads, vectors of channels inside. Fused: scale and sum, which eager does in two passes with
// two fresh tensors. 3 * N elements moved a row, 2 FLOPs an element: bound by memory.
#include "cpu/vector.h"

namespace mra::cpu::MRA_ISA {
namespace {

template <class T>
void scale_residual(const LinearScaleResidualForward& a) {
  const T* scale = static_cast<const T*>(a.scale);
#pragma omp parallel for num_threads(a.threads)
  for (int64_t row = 0; row < a.rows; ++row) {
    T* y = static_cast<T*>(a.y) + row * a.channels;
    const T* residual = static_cast<const T*>(a.residual) + row * a.channels;
    for (int64_t c = 0; c < a.channels; c += kLanes) {
      const int64_t lanes = a.channels - c;
      const Floats factor = scale == nullptr ? broadcast(1.0f) : load_first(scale + c, lanes);
      store_first(y + c, load_first(residual + c, lanes) + factor * load_first(y + c, lanes), lanes);
    }
  }
}

}  // namespace

void linear_scale_residual_forward(const LinearScaleResidualForward& a) {
  with_type(a.dtype, [&](auto element) { scale_residual<decltype(element)>(a); });
}

}  // namespace mra::cpu::MRA_ISA
