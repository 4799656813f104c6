#include "sim/rt/fault.h"

#include <signal.h>
#include <ucontext.h>

#include <cstring>

#include "sim/rt/findings.h"

namespace tranche::sim {

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction previous[3];
stack_t previous_stack;
alignas(16) char handler_stack[64 * 1024];

// Runs on a stack of its own, since the fiber's may be what overflowed, and leaves it by switching to the
// host's stack: the fiber is never resumed. The faults are synchronous and come from kernel code, which holds
// no locks.
void on_fault(int signal, siginfo_t* info, void* context) {
  if (current == nullptr) {
    for (int i = 0; i < 3; ++i) {
      if (kSignals[i] == signal) sigaction(signal, &previous[i], nullptr);
    }
    return;  // and fault again
  }
  Thread& thread = *current;
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  uintptr_t pc = 0;
#if defined(__x86_64__)
  pc = uintptr_t(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]) + 1;
#endif
  std::string what = "fault: ";
  if (signal == SIGFPE) {
    what += "integer division by zero";
  } else if (address - (thread.stack.low - 4096) < 4096) {
    what += "the thread's stack overflowed";
  } else {
    what += "access to " + address_text(*thread.block, address);
  }
  report_and_stop(&thread, what, {}, pc);
}

}  // namespace

FaultGuard::FaultGuard() {
  stack_t stack{};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &previous_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // it may not return, so nothing may stay blocked
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &previous[i]);
}

FaultGuard::~FaultGuard() {
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace tranche::sim
