// Every CPU kernel exists once per instruction set; this picks the widest one that the processor has.
#include <stdexcept>
#include <string>

#include "launch.h"

#define MRA_DECLARE(isa)                                                 \
  namespace isa {                                                        \
  void depthwise_conv_norm_forward(const DepthwiseConvNormForward&);     \
  void depthwise_conv_norm_backward(const DepthwiseConvNormBackward&);   \
  void linear_scale_residual_forward(const LinearScaleResidualForward&); \
  void gated_resample_add_forward(const GatedResampleAddForward&);       \
  void gated_resample_add_backward(const GatedResampleAddBackward&);     \
  }

namespace mra::cpu {

MRA_DECLARE(baseline)
#ifdef MRA_X86
MRA_DECLARE(avx2)
MRA_DECLARE(avx512)
#endif

namespace {

struct Kernels {
  const char* name;
  bool supported;
  decltype(&baseline::depthwise_conv_norm_forward) depthwise_conv_norm_forward;
  decltype(&baseline::depthwise_conv_norm_backward) depthwise_conv_norm_backward;
  decltype(&baseline::linear_scale_residual_forward) linear_scale_residual_forward;
  decltype(&baseline::gated_resample_add_forward) gated_resample_add_forward;
  decltype(&baseline::gated_resample_add_backward) gated_resample_add_backward;
};

#define MRA_KERNELS(isa, supported)                                                                           \
  Kernels {                                                                                                   \
    #isa, supported, isa::depthwise_conv_norm_forward, isa::depthwise_conv_norm_backward,                     \
        isa::linear_scale_residual_forward, isa::gated_resample_add_forward, isa::gated_resample_add_backward \
  }

// From the widest to the narrowest.
const Kernels kAll[] = {
#ifdef MRA_X86
    MRA_KERNELS(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")),
    MRA_KERNELS(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
    MRA_KERNELS(baseline, true),
};

const Kernels* widest() {
  for (const Kernels& kernels : kAll) {
    if (kernels.supported) return &kernels;
  }
  return nullptr;  // not reached: baseline is supported
}

const Kernels* selected = widest();

}  // namespace

const char* instruction_set() { return selected->name; }

void select_instruction_set(const char* name) {
  for (const Kernels& kernels : kAll) {
    if (std::string(name) != kernels.name) continue;
    if (!kernels.supported) throw std::invalid_argument(std::string("this processor has no ") + name);
    selected = &kernels;
    return;
  }
  throw std::invalid_argument(std::string(name) + " is no instruction set of this build");
}

void depthwise_conv_norm_forward(const DepthwiseConvNormForward& a) { selected->depthwise_conv_norm_forward(a); }
void depthwise_conv_norm_backward(const DepthwiseConvNormBackward& a) { selected->depthwise_conv_norm_backward(a); }
void linear_scale_residual_forward(const LinearScaleResidualForward& a) { selected->linear_scale_residual_forward(a); }
void gated_resample_add_forward(const GatedResampleAddForward& a) { selected->gated_resample_add_forward(a); }
void gated_resample_add_backward(const GatedResampleAddBackward& a) { selected->gated_resample_add_backward(a); }

}  // namespace mra::cpu
