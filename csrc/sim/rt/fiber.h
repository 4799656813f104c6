// Fibers: stacks of their own, switched by a few instructions. A fiber never returns and is never unwound;
// when a kernel is stopped its fibers are simply not resumed again, and their stacks serve the next ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <ucontext.h>

namespace tranche::sim {

struct Stack {
  uintptr_t low = 0;  // above the guard page
  size_t bytes = 0;
};

// Stacks side by side in one reserved range, mapped on first use and kept. Below each lies a page that may
// not be touched, so that an overflow is a fault and not a corrupted neighbour.
class StackPool {
 public:
  static constexpr size_t kStackBytes = 64 * 1024;
  static constexpr size_t kGuardBytes = 4096;
  static constexpr size_t kMaxStacks = 2048;

  Stack get(size_t index);
  bool contains(uintptr_t address) const {  // any stack, or a guard page
    return address - base_ < kMaxStacks * (kStackBytes + kGuardBytes);
  }

 private:
  uintptr_t base_ = 0;
  std::vector<bool> open_;
};

using FiberEntry = void (*)();

class Fiber {
 public:
  // Makes the next switch to this fiber start `entry` on `stack`.
  void start(const Stack& stack, FiberEntry entry, bool use_ucontext);
  // Suspends `from` and resumes `to`.
  static void switch_to(Fiber& from, Fiber& to, bool use_ucontext);

 private:
  void* saved_stack_pointer_ = nullptr;
  std::unique_ptr<ucontext_t> context_;
};

// Whether the assembly switch exists for this processor.
bool has_assembly_switch();

}  // namespace tranche::sim
