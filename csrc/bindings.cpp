// The Python module mra_kernels._C: raw pointers, sizes, and where to run. Torch is neither needed nor known here;
// mra_kernels/native checks the tensors and passes their addresses.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace py = pybind11;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

mra::DType dtype_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("dtype code " + std::to_string(code) + " is not 0, 1 or 2");
  return static_cast<mra::DType>(code);
}

// The CPU kernels hold float32 and bfloat16.
mra::DType cpu_dtype_of(int code) {
  const mra::DType dtype = dtype_of(code);
  if (dtype == mra::DType::kFloat16) throw std::invalid_argument("the CPU kernels do not take float16");
  return dtype;
}

py::dict build_info() {
  py::dict info;
  info["version"] = MRA_VERSION;
  info["compiler"] = MRA_COMPILER;
  info["instruction_set"] = mra::cpu::instruction_set();
#ifdef MRA_CUDA
  info["cuda"] = MRA_CUDA;
  info["cuda_archs"] = MRA_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  return info;
}

void depthwise_conv_norm_forward(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t norm_weight,
                                 uintptr_t norm_bias, uintptr_t y, uintptr_t mean, uintptr_t rstd, int64_t batch,
                                 int64_t height, int64_t width, int64_t channels, float eps, int dtype, int threads) {
  mra::cpu::depthwise_conv_norm_forward({pointer(x), pointer(weight), pointer(bias), pointer(norm_weight),
                                         pointer(norm_bias), pointer(y), pointer<float>(mean), pointer<float>(rstd),
                                         batch, height, width, channels, eps, cpu_dtype_of(dtype), threads});
}

void depthwise_conv_norm_backward(uintptr_t grad_y, uintptr_t x, uintptr_t weight, uintptr_t bias,
                                  uintptr_t norm_weight, uintptr_t mean, uintptr_t rstd, uintptr_t grad_x,
                                  uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t grad_norm_weight,
                                  uintptr_t grad_norm_bias, int64_t batch, int64_t height, int64_t width,
                                  int64_t channels, int dtype, int threads) {
  mra::cpu::depthwise_conv_norm_backward(
      {pointer(grad_y), pointer(x), pointer(weight), pointer(bias), pointer(norm_weight), pointer<float>(mean),
       pointer<float>(rstd), pointer(grad_x), pointer(grad_weight), pointer(grad_bias), pointer(grad_norm_weight),
       pointer(grad_norm_bias), batch, height, width, channels, cpu_dtype_of(dtype), threads});
}

void linear_scale_residual_forward(uintptr_t y, uintptr_t scale, uintptr_t residual, int64_t rows, int64_t channels,
                                   int dtype, int threads) {
  mra::cpu::linear_scale_residual_forward(
      {pointer(y), pointer(scale), pointer(residual), rows, channels, cpu_dtype_of(dtype), threads});
}

// device -1 is the CPU.
void gated_resample_add_forward(uintptr_t low, uintptr_t high, uintptr_t gate, uintptr_t y, int64_t batch,
                                int64_t height, int64_t width, int64_t channels, int64_t high_height,
                                int64_t high_width, int dtype, int device, uintptr_t stream, int threads) {
  mra::GatedResampleAddForward arguments{
      pointer(low), pointer(high), pointer<float>(gate), pointer(y),      batch,   height,         width,
      channels,     high_height,   high_width,           dtype_of(dtype), threads, pointer(stream)};
  if (device < 0) {
    cpu_dtype_of(dtype);
    mra::cpu::gated_resample_add_forward(arguments);
  } else {
#ifdef MRA_CUDA
    mra::cuda::gated_resample_add_forward(arguments, device);
#else
    throw std::runtime_error("mra_kernels._C was built without CUDA");
#endif
  }
}

void gated_resample_add_backward(uintptr_t grad_y, uintptr_t high, uintptr_t gate, uintptr_t grad_high,
                                 uintptr_t grad_gate, uintptr_t partial, int64_t batch, int64_t height, int64_t width,
                                 int64_t channels, int64_t high_height, int64_t high_width, int dtype, int device,
                                 uintptr_t stream, int threads) {
  mra::GatedResampleAddBackward arguments{pointer(grad_y),
                                          pointer(high),
                                          pointer<float>(gate),
                                          pointer(grad_high),
                                          pointer<float>(grad_gate),
                                          pointer<float>(partial),
                                          batch,
                                          height,
                                          width,
                                          channels,
                                          high_height,
                                          high_width,
                                          dtype_of(dtype),
                                          threads,
                                          pointer(stream)};
  if (device < 0) {
    cpu_dtype_of(dtype);
    mra::cpu::gated_resample_add_backward(arguments);
  } else {
#ifdef MRA_CUDA
    mra::cuda::gated_resample_add_backward(arguments, device);
#else
    throw std::runtime_error("mra_kernels._C was built without CUDA");
#endif
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of mra_kernels; call them through mra_kernels.ops.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("build_info", build_info);
  m.def("select_instruction_set", mra::cpu::select_instruction_set);
  m.def("depthwise_conv_norm_forward", depthwise_conv_norm_forward, unlocked);
  m.def("depthwise_conv_norm_backward", depthwise_conv_norm_backward, unlocked);
  m.def("linear_scale_residual_forward", linear_scale_residual_forward, unlocked);
  m.def("gated_resample_add_forward", gated_resample_add_forward, unlocked);
  m.def("gated_resample_add_backward", gated_resample_add_backward, unlocked);
}
