// Cooperative threads with stacks of their own: one per CUDA thread of the block that runs.
//
// On x86-64 a switch is a dozen instructions. Elsewhere (or with CUDA_ON_CPU_UCONTEXT) it is
// swapcontext, which also makes a system call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if !defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_UCONTEXT
#endif

#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#else
// Saves the callee-saved registers on this stack, stores its top in *from and goes on with `to`.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#endif

namespace cuda_on_cpu {

// Kernels keep their arrays in registers or shared memory; unoptimised frames stay far below this.
constexpr std::size_t kStackBytes = 64 * 1024;

class Fiber {
 public:
  using Entry = void (*)();

  Fiber() : stack_(static_cast<char*>(std::malloc(kStackBytes)), &std::free) {
    if (!stack_) throw std::bad_alloc();
  }

  // The next resume() starts `entry`, which must end in suspend() and never return.
  void prepare(Entry entry) {
#ifdef CUDA_ON_CPU_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    auto top = reinterpret_cast<std::uintptr_t>(stack_.get() + kStackBytes) & ~std::uintptr_t{15};
    void** frame = reinterpret_cast<void**>(top);
    *--frame = nullptr;  // a return address for `entry`, so that its stack is aligned as if called
    *--frame = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--frame = nullptr;  // the registers that a switch pops
    context_ = frame;
#endif
  }

  // Runs the fiber until it suspends.
  void resume() {
#ifdef CUDA_ON_CPU_UCONTEXT
    swapcontext(&scheduler_, &context_);
#else
    cuda_on_cpu_switch(&scheduler_, context_);
#endif
  }

  // Called on the fiber: back to whoever resumed it.
  void suspend() {
#ifdef CUDA_ON_CPU_UCONTEXT
    swapcontext(&context_, &scheduler_);
#else
    cuda_on_cpu_switch(&context_, scheduler_);
#endif
  }

 private:
  std::unique_ptr<char, decltype(&std::free)> stack_;
#ifdef CUDA_ON_CPU_UCONTEXT
  ucontext_t context_{}, scheduler_{};
#else
  void* context_ = nullptr;
  void* scheduler_ = nullptr;
#endif
};

}  // namespace cuda_on_cpu
