// The functions that the compiler calls when it instruments a kernel: __tsan_* before every load and store
// (-fsanitize=thread), __ubsan_* when a pointer is less aligned than its type says, an index leaves its
// array, or a shift its width. The sanitizers' own runtimes are never linked. All of them return at once
// outside a kernel.
#include <dlfcn.h>

#include "sim/rt/findings.h"
#include "sim/rt/order.h"

#define HOOK extern "C" __attribute__((visibility("default")))
#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace tranche::sim {

namespace {

inline void see(const void* address, size_t bytes, uintptr_t pc, bool write, bool atomic) {
  Thread* thread = checked;
  if (thread == nullptr) return;
  const auto where = reinterpret_cast<uintptr_t>(address);
  if (where - thread->stack.low < thread->stack.bytes) return;
  checked = nullptr;  // should instrumented code ever be reached from within, it is not a kernel's
  check_access(*thread, {where, bytes, pc, write, atomic});
  checked = thread;
}

inline bool is_global(const Thread* thread, const void* address) {
  const auto where = reinterpret_cast<uintptr_t>(address);
  return thread != nullptr && where - thread->stack.low >= thread->stack.bytes &&
         !thread->block->shared.contains(where);
}

// A polling loop reads through volatile. Let the others run first: between the check and the load that
// follows it, nobody may.
inline void see_volatile_read(const void* address, size_t bytes, uintptr_t pc) {
  if (is_global(checked, address)) tranche_sim_pause();
  see(address, bytes, pc, false, true);
  if (is_global(checked, address)) take_over(*checked, reinterpret_cast<uintptr_t>(address));
}

inline void see_volatile_write(const void* address, size_t bytes, uintptr_t pc) {
  see(address, bytes, pc, true, true);
  if (is_global(checked, address)) hand_over(*checked, reinterpret_cast<uintptr_t>(address));
}

}  // namespace
}  // namespace tranche::sim

using namespace tranche::sim;

#define HOOKS(size)                                                                               \
  HOOK void __tsan_read##size(void* p) { see(p, size, CALLER, false, false); }                    \
  HOOK void __tsan_write##size(void* p) { see(p, size, CALLER, true, false); }                    \
  HOOK void __tsan_unaligned_read##size(void* p) { see(p, size, CALLER, false, false); }          \
  HOOK void __tsan_unaligned_write##size(void* p) { see(p, size, CALLER, true, false); }          \
  HOOK void __tsan_volatile_read##size(void* p) { see_volatile_read(p, size, CALLER); }           \
  HOOK void __tsan_volatile_write##size(void* p) { see_volatile_write(p, size, CALLER); }         \
  HOOK void __tsan_unaligned_volatile_read##size(void* p) { see_volatile_read(p, size, CALLER); } \
  HOOK void __tsan_unaligned_volatile_write##size(void* p) { see_volatile_write(p, size, CALLER); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#undef HOOKS

HOOK void __tsan_read_range(void* p, size_t bytes) { see(p, bytes, CALLER, false, false); }
HOOK void __tsan_write_range(void* p, size_t bytes) { see(p, bytes, CALLER, true, false); }
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_init() {}
HOOK void __tsan_atomic_thread_fence(int) {
  if (current != nullptr) tranche_sim_fence();
}
HOOK void __tsan_atomic_signal_fence(int) {}

// C++ atomics, which host code of the same file may use (reference counts, once-flags).
#define ATOMIC_HOOKS(bits, T)                                                                  \
  HOOK T __tsan_atomic##bits##_load(const volatile T* p, int) {                                \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                               \
  }                                                                                            \
  HOOK void __tsan_atomic##bits##_store(volatile T* p, T v, int) {                             \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                            \
  HOOK T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                             \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                        \
  }                                                                                            \
  HOOK T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                            \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                         \
  }                                                                                            \
  HOOK T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) {                            \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                         \
  }                                                                                            \
  HOOK T __tsan_atomic##bits##_fetch_and(volatile T* p, T v, int) {                            \
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);                                         \
  }                                                                                            \
  HOOK T __tsan_atomic##bits##_fetch_or(volatile T* p, T v, int) {                             \
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                          \
  }                                                                                            \
  HOOK T __tsan_atomic##bits##_fetch_xor(volatile T* p, T v, int) {                            \
    return __atomic_fetch_xor(p, v, __ATOMIC_SEQ_CST);                                         \
  }                                                                                            \
  HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* c, T v, int, int) { \
    return __atomic_compare_exchange_n(p, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);    \
  }                                                                                            \
  HOOK int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* c, T v, int, int) {   \
    return __atomic_compare_exchange_n(p, c, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);     \
  }                                                                                            \
  HOOK T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T c, T v, int, int) {       \
    __atomic_compare_exchange_n(p, &c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
    return c;                                                                                  \
  }
ATOMIC_HOOKS(8, uint8_t)
ATOMIC_HOOKS(16, uint16_t)
ATOMIC_HOOKS(32, uint32_t)
ATOMIC_HOOKS(64, uint64_t)
#undef ATOMIC_HOOKS

// The compiler does not instrument calls of these; the linker's --wrap sends a kernel library's here.
HOOK void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  see(from, bytes, CALLER, false, false);
  see(to, bytes, CALLER, true, false);
  return memcpy(to, from, bytes);
}
HOOK void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  see(from, bytes, CALLER, false, false);
  see(to, bytes, CALLER, true, false);
  return memmove(to, from, bytes);
}
HOOK void* __wrap_memset(void* to, int value, size_t bytes) {
  see(to, bytes, CALLER, true, false);
  return memset(to, value, bytes);
}

// ---- undefined behaviour

namespace {

// How every __ubsan_* argument begins.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct AlignmentData {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment, kind;
};

void undefined(const SourceLocation& at, const std::string& what) {
  if (current == nullptr) return;
  report_and_stop(current, what, {at.file, int(at.line)}, 0);
}

}  // namespace

HOOK void __ubsan_handle_type_mismatch_v1(AlignmentData* data, uintptr_t pointer) {
  if (current == nullptr) return;
  const uintptr_t alignment = uintptr_t(1) << data->log_alignment;
  if (pointer != 0 && pointer % alignment == 0) return;
  undefined(data->location, pointer == 0
                                ? std::string("null pointer followed")
                                : "misaligned: an access that needs " + std::to_string(alignment) +
                                      "-byte alignment, at " + address_text(*current->block, pointer));
}
HOOK void __ubsan_handle_out_of_bounds(SourceLocation* at, uintptr_t index) {
  undefined(*at, "index out of bounds: " + std::to_string(long(index)));
}
HOOK void __ubsan_handle_shift_out_of_bounds(SourceLocation* at, uintptr_t, uintptr_t by) {
  undefined(*at, "shift out of range: by " + std::to_string(long(by)));
}
HOOK void __ubsan_handle_divrem_overflow(SourceLocation* at, uintptr_t, uintptr_t) {
  undefined(*at, "integer division by zero, or overflow");
}
