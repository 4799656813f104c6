#include "sim/rt/fiber.h"

#include <sys/mman.h>

#include <new>

namespace tranche::sim {

Stack StackPool::get(size_t index) {
  constexpr size_t kEach = kStackBytes + kGuardBytes;
  if (base_ == 0) {
    void* base =
        mmap(nullptr, kMaxStacks * kEach, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = reinterpret_cast<uintptr_t>(base);
    open_.resize(kMaxStacks);
  }
  const uintptr_t low = base_ + index * kEach + kGuardBytes;
  if (!open_.at(index)) {
    if (mprotect(reinterpret_cast<void*>(low), kStackBytes, PROT_READ | PROT_WRITE) != 0)
      throw std::bad_alloc();
    open_[index] = true;
  }
  return {low, kStackBytes};
}

#if defined(__x86_64__)

// Saves what the System V ABI says a call preserves, swaps stack pointers, restores. The floating-point
// control words are left alone: kernels do not change them.
extern "C" __attribute__((visibility("hidden"))) void tranche_sim_switch_stacks(void** save, void* load);

asm(R"(
.text
.p2align 4
.hidden tranche_sim_switch_stacks
.globl tranche_sim_switch_stacks
.type tranche_sim_switch_stacks, @function
tranche_sim_switch_stacks:
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
.size tranche_sim_switch_stacks, .-tranche_sim_switch_stacks
)");

bool has_assembly_switch() { return true; }

#else

static void tranche_sim_switch_stacks(void**, void*) { __builtin_unreachable(); }

bool has_assembly_switch() { return false; }

#endif

void Fiber::start(const Stack& stack, FiberEntry entry, bool use_ucontext) {
  if (use_ucontext) {
    if (!context_) context_ = std::make_unique<ucontext_t>();
    getcontext(context_.get());
    context_->uc_stack.ss_sp = reinterpret_cast<void*>(stack.low);
    context_->uc_stack.ss_size = stack.bytes;
    context_->uc_link = nullptr;
    makecontext(context_.get(), entry, 0);
    return;
  }
  // As the switch left it: six registers, where to return to, and above that a return address of zero for
  // `entry` itself, which ends every backtrace and puts the stack at the alignment of a function's start.
  void** top = reinterpret_cast<void**>(stack.low + stack.bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  saved_stack_pointer_ = top;
}

void Fiber::switch_to(Fiber& from, Fiber& to, bool use_ucontext) {
  if (use_ucontext) {
    if (!from.context_) from.context_ = std::make_unique<ucontext_t>();
    swapcontext(from.context_.get(), to.context_.get());
    return;
  }
  tranche_sim_switch_stacks(&from.saved_stack_pointer_, to.saved_stack_pointer_);
}

}  // namespace tranche::sim
