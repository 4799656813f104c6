// Atomics, on global and on shared memory. Launches run on one host thread, so plain arithmetic will do.
#include <algorithm>
#include <type_traits>

#include "sim/rt/findings.h"
#include "sim/rt/order.h"

namespace tranche::sim {

namespace {

template <class T>
T apply(AtomicOp op, T old, T value, T compare) {
  switch (op) {
    case AtomicOp::add:
      if constexpr (std::is_integral_v<T>) {
        using U = std::make_unsigned_t<T>;
        return T(U(old) + U(value));
      } else {
        return old + value;
      }
    case AtomicOp::min:
      return std::min(old, value);
    case AtomicOp::max:
      return std::max(old, value);
    case AtomicOp::exchange:
      return value;
    case AtomicOp::compare_exchange:
      return old == compare ? value : old;
    case AtomicOp::increment:
      return old >= value ? T(0) : T(old + 1);
    case AtomicOp::decrement:
      return old == T(0) || old > value ? value : T(old - 1);
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (op == AtomicOp::bit_and) return old & value;
    if (op == AtomicOp::bit_or) return old | value;
    if (op == AtomicOp::bit_xor) return old ^ value;
  }
  return old;
}

template <class T>
uint64_t run(void* address, AtomicOp op, uint64_t value_bits, uint64_t compare_bits) {
  T old, value, compare;
  memcpy(&old, address, sizeof old);
  memcpy(&value, &value_bits, sizeof value);
  memcpy(&compare, &compare_bits, sizeof compare);
  const T next = apply(op, old, value, compare);
  memcpy(address, &next, sizeof next);
  uint64_t result = 0;
  memcpy(&result, &old, sizeof old);
  return result;
}

}  // namespace
}  // namespace tranche::sim

using namespace tranche::sim;

uint64_t tranche_sim_atomic(void* address, AtomicOp op, AtomicType type, uint64_t value, uint64_t compare,
                            Site site) {
  Thread& thread = *current;
  const size_t bytes = type == AtomicType::s64 || type == AtomicType::u64 || type == AtomicType::f64 ? 8 : 4;
  const auto where = reinterpret_cast<uintptr_t>(address);
  if (where % bytes != 0) {
    report_and_stop(
        &thread,
        "misaligned: atomic on " + std::to_string(bytes) + " bytes, " + address_text(*thread.block, where),
        site, 0);
  }
  // Where threads compete is where their order matters: give another one the chance to be first.
  if ((machine.random.next() & 7) == 0) yield_now();
  if (checked != nullptr) {
    check_access(thread,
                 {where, bytes, reinterpret_cast<uintptr_t>(__builtin_return_address(0)), true, true});
    if (!thread.block->shared.contains(where)) {
      take_over(thread, where);
      hand_over(thread, where);
    }
  }
  switch (type) {
    case AtomicType::s32:
      return run<int32_t>(address, op, value, compare);
    case AtomicType::u32:
      return run<uint32_t>(address, op, value, compare);
    case AtomicType::s64:
      return run<int64_t>(address, op, value, compare);
    case AtomicType::u64:
      return run<uint64_t>(address, op, value, compare);
    case AtomicType::f32:
      return run<float>(address, op, value, compare);
    case AtomicType::f64:
      return run<double>(address, op, value, compare);
  }
  return 0;
}

void tranche_sim_fence() {
  Thread& thread = *current;
  Block& block = *thread.block;
  if (checked == nullptr) return;
  advance_label(block);
  thread.fence = {block.epoch, block.now, thread.warp->floor};
  machine.launch.fences[uint64_t(block.linear) << 10 | thread.id] = thread.fence;
}
