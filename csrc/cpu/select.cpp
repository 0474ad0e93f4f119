// Every CPU kernel exists once per instruction set; this picks the widest one that the processor has.
#include <stdexcept>
#include <string>

#include "launch.h"

namespace mra::cpu {

#define MRA_DECLARE(isa, name, Arguments) \
  namespace isa {                         \
  void name(const Arguments&);            \
  }
MRA_CPU_KERNELS(MRA_DECLARE, baseline)
#ifdef MRA_X86
MRA_CPU_KERNELS(MRA_DECLARE, avx2)
MRA_CPU_KERNELS(MRA_DECLARE, avx512)
MRA_CPU_KERNELS(MRA_DECLARE, avx512_bf16)
#endif

namespace {

#define MRA_MEMBER(isa, name, Arguments) void (*name)(const Arguments&);
struct Kernels {
  const char* instruction_set;
  bool supported;
  MRA_CPU_KERNELS(MRA_MEMBER, )
};

#ifdef MRA_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#define MRA_ADDRESS(isa, name, Arguments) isa::name,
#define MRA_KERNELS(isa, supported) \
  Kernels { #isa, supported, MRA_CPU_KERNELS(MRA_ADDRESS, isa) }

// From the widest to the narrowest.
const Kernels kAll[] = {
#ifdef MRA_X86
    MRA_KERNELS(avx512_bf16, has_avx512() && __builtin_cpu_supports("avx512bf16")),
    MRA_KERNELS(avx512, has_avx512()),
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

const char* instruction_set() { return selected->instruction_set; }

void select_instruction_set(const char* name) {
  for (const Kernels& kernels : kAll) {
    if (std::string(name) != kernels.instruction_set) continue;
    if (!kernels.supported) throw std::invalid_argument(std::string("this processor has no ") + name);
    selected = &kernels;
    return;
  }
  throw std::invalid_argument(std::string(name) + " is no instruction set of this build");
}

#define MRA_CALL(isa, name, Arguments) \
  void name(const Arguments& arguments) { selected->name(arguments); }
MRA_CPU_KERNELS(MRA_CALL, )

}  // namespace mra::cpu
