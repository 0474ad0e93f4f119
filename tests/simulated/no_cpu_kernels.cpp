// In place of csrc/cpu, which the bindings refer to: the simulated extension has the CUDA kernels alone.
#include <stdexcept>

#include "launch.h"

namespace mra::cpu {

const char* instruction_set() { return "none"; }
void select_instruction_set(const char*) {}

#define MRA_REFUSE(context, name, Arguments) \
  void name(const Arguments&) { throw std::logic_error(#name ": the simulated extension has no CPU kernels"); }
MRA_CPU_KERNELS(MRA_REFUSE, )

}  // namespace mra::cpu
