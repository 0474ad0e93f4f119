// Picks the widest instruction set of this processor, once, for every kernel.
#include "launch.h"

#define MRA_DECLARE(isa)                                                      \
  namespace isa {                                                             \
  void depthwise_conv_norm_forward(const DepthwiseConvNormForward&);          \
  void depthwise_conv_norm_backward(const DepthwiseConvNormBackward&);        \
  void gated_resample_add_forward(const GatedResampleAddForward&);            \
  void gated_resample_add_backward(const GatedResampleAddBackward&);          \
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
  decltype(&baseline::depthwise_conv_norm_forward) depthwise_conv_norm_forward;
  decltype(&baseline::depthwise_conv_norm_backward) depthwise_conv_norm_backward;
  decltype(&baseline::gated_resample_add_forward) gated_resample_add_forward;
  decltype(&baseline::gated_resample_add_backward) gated_resample_add_backward;
};

#define MRA_KERNELS(isa)                                                                     \
  Kernels{#isa, isa::depthwise_conv_norm_forward, isa::depthwise_conv_norm_backward,        \
          isa::gated_resample_add_forward, isa::gated_resample_add_backward}

const Kernels& kernels() {
  static const Kernels selected = [] {
#ifdef MRA_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      return MRA_KERNELS(avx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return MRA_KERNELS(avx2);
#endif
    return MRA_KERNELS(baseline);
  }();
  return selected;
}

}  // namespace

const char* instruction_set() { return kernels().name; }

void depthwise_conv_norm_forward(const DepthwiseConvNormForward& a) { kernels().depthwise_conv_norm_forward(a); }
void depthwise_conv_norm_backward(const DepthwiseConvNormBackward& a) { kernels().depthwise_conv_norm_backward(a); }
void gated_resample_add_forward(const GatedResampleAddForward& a) { kernels().gated_resample_add_forward(a); }
void gated_resample_add_backward(const GatedResampleAddBackward& a) { kernels().gated_resample_add_backward(a); }

}  // namespace mra::cpu
