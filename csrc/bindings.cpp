// The Python module mra_kernels._C: raw pointers, sizes, and where to run. Torch is neither needed nor known here;
// mra_kernels/native checks the tensors and passes their addresses.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "launch.h"

namespace py = pybind11;

namespace {

// An address from Python, as whatever pointer an argument is.
struct Pointer {
  uintptr_t address;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

mra::DType dtype_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("dtype code " + std::to_string(code) + " is not 0, 1 or 2");
  return static_cast<mra::DType>(code);
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

const auto kUnlocked = py::call_guard<py::gil_scoped_release>();

template <size_t>
using Address = uintptr_t;
template <size_t>
using Size = int64_t;

template <class Arguments>
using Kernel = void(const Arguments&);

// Without a CUDA kernel, or in a build without CUDA, `cuda` is null.
template <class Arguments>
void run(const Arguments& arguments, Kernel<Arguments>* cpu, Kernel<Arguments>* cuda) {
  if (arguments.place.device < 0) {
    if (arguments.dtype == mra::DType::kFloat16) throw std::invalid_argument("the CPU kernels do not take float16");
    cpu(arguments);
  } else if (cuda != nullptr) {
    cuda(arguments);
  } else {
    throw std::runtime_error("mra_kernels._C has no CUDA kernel of this op");
  }
}

// Binds kernels whose arguments are pointers, then sizes, then `More`, the dtype and the place, in the order of their
// structure.
template <class... More, class Arguments, size_t... Pointers, size_t... Sizes>
void bind(py::module_& m, const char* name, Kernel<Arguments>* cpu, Kernel<Arguments>* cuda,
          std::index_sequence<Pointers...>, std::index_sequence<Sizes...>) {
  m.def(
      name,
      [cpu, cuda](Address<Pointers>... pointers, Size<Sizes>... sizes, More... more, int dtype, int device,
                  uintptr_t stream, int threads) {
        const mra::Place place{device, Pointer{stream}, threads};
        run(Arguments{Pointer{pointers}..., sizes..., more..., dtype_of(dtype), place}, cpu, cuda);
      },
      kUnlocked);
}

template <size_t kPointers, size_t kSizes, class... More, class Arguments>
void bind(py::module_& m, const char* name, Kernel<Arguments>* cpu,
          std::common_type_t<Kernel<Arguments>*> cuda = nullptr) {
  bind<More...>(m, name, cpu, cuda, std::make_index_sequence<kPointers>(), std::make_index_sequence<kSizes>());
}

#ifdef MRA_CUDA
#define MRA_CUDA_KERNEL(name) mra::cuda::name
#else
#define MRA_CUDA_KERNEL(name) nullptr
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of mra_kernels; call them through mra_kernels.ops.";
  m.def("build_info", build_info);
  m.def("select_instruction_set", mra::cpu::select_instruction_set);
  using namespace mra::cpu;
  bind<5, 8, float>(m, "attention_forward", attention_forward);
  bind<9, 8, float>(m, "attention_backward", attention_backward);
  bind<7, 4>(m, "depthwise_conv_gelu_forward", depthwise_conv_gelu_forward,
             MRA_CUDA_KERNEL(depthwise_conv_gelu_forward));
  bind<11, 4>(m, "depthwise_conv_gelu_backward", depthwise_conv_gelu_backward,
              MRA_CUDA_KERNEL(depthwise_conv_gelu_backward));
  bind<8, 4, float>(m, "depthwise_conv_norm_forward", depthwise_conv_norm_forward,
                    MRA_CUDA_KERNEL(depthwise_conv_norm_forward));
  bind<14, 4>(m, "depthwise_conv_norm_backward", depthwise_conv_norm_backward,
              MRA_CUDA_KERNEL(depthwise_conv_norm_backward));
  bind<4, 6>(m, "gated_resample_add_forward", gated_resample_add_forward, MRA_CUDA_KERNEL(gated_resample_add_forward));
  bind<6, 6>(m, "gated_resample_add_backward", gated_resample_add_backward,
             MRA_CUDA_KERNEL(gated_resample_add_backward));
  bind<5, 3>(m, "linear_gelu_forward", linear_gelu_forward, MRA_CUDA_KERNEL(linear_gelu_forward));
  bind<7, 3>(m, "linear_gelu_backward", linear_gelu_backward, MRA_CUDA_KERNEL(linear_gelu_backward));
  bind<4, 2>(m, "linear_scale_residual_forward", linear_scale_residual_forward,
             MRA_CUDA_KERNEL(linear_scale_residual_forward));
  bind<7, 2>(m, "linear_scale_residual_backward", linear_scale_residual_backward,
             MRA_CUDA_KERNEL(linear_scale_residual_backward));
  bind<6, 4, float>(m, "norm_patchify_forward", norm_patchify_forward, MRA_CUDA_KERNEL(norm_patchify_forward));
  bind<9, 4>(m, "norm_patchify_backward", norm_patchify_backward, MRA_CUDA_KERNEL(norm_patchify_backward));
  bind<8, 6, float>(m, "patch_conv_norm_forward", patch_conv_norm_forward, MRA_CUDA_KERNEL(patch_conv_norm_forward));
  bind<8, 2, float>(m, "patch_conv_norm_backward", patch_conv_norm_backward, MRA_CUDA_KERNEL(patch_conv_norm_backward));
#ifdef MRA_CUDA
  m.def("depthwise_conv_gelu_sums", mra::cuda::depthwise_conv_gelu_sums);
  m.def("depthwise_conv_gelu_partials", mra::cuda::depthwise_conv_gelu_partials);
  m.def("depthwise_conv_norm_partials", mra::cuda::depthwise_conv_norm_partials);
  m.def("layer_norm_partials", mra::cuda::layer_norm_partials);
  m.def("linear_gelu_partials", mra::cuda::linear_gelu_partials);
  m.def("linear_scale_residual_partials", mra::cuda::linear_scale_residual_partials);
#endif
}
