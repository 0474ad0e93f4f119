// A fiber's context: where it stands while another one runs.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_simulator {

#if defined(__x86_64__)

// System V: a switch is a function call, so only what a callee must preserve has to be kept.
extern "C" void cuda_simulator_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
  .text
  .p2align 4
  .type cuda_simulator_switch, @function
cuda_simulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_simulator_switch, . - cuda_simulator_switch
)");

class Context {
 public:
  // The next switch to this context calls `entry`, which must not return, on the stack that ends at `stack + bytes`.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{63});
    // The return address of `entry`, which also aligns the stack as a call does.
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
  }
  static void swap(Context& from, Context& to) { cuda_simulator_switch(&from.stack_pointer_, to.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};

#else

// Everywhere else, about ten times slower: the library also saves the signal mask.
class Context {
 public:
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace cuda_simulator
