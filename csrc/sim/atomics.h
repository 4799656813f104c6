// Atomics run inside the runtime, which knows them from plain accesses and uses them to follow the
// fence-and-counter hand-over between blocks.
#pragma once

#include <type_traits>

#include "sim/runtime.h"
#include "sim/synchronization.h"

namespace tranche::sim {

template <class T>
constexpr AtomicType atomic_type() {
  if constexpr (std::is_same_v<T, float>) {
    return AtomicType::f32;
  } else if constexpr (std::is_same_v<T, double>) {
    return AtomicType::f64;
  } else {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "no such atomic on the GPU");
    if constexpr (sizeof(T) == 8) return std::is_signed_v<T> ? AtomicType::s64 : AtomicType::u64;
    return std::is_signed_v<T> ? AtomicType::s32 : AtomicType::u32;
  }
}

template <class T>
T atomic(T* address, AtomicOp op, T value, T compare, Site site) {
  return from_bits<T>(
      tranche_sim_atomic(address, op, atomic_type<T>(), to_bits(value), to_bits(compare), site));
}

}  // namespace tranche::sim

// The second argument takes no part in deduction: atomicAdd(&unsigned, 1) converts, as CUDA's overloads do.
#define TRANCHE_SIM_ATOMIC(name, op)                                                                        \
  template <class T>                                                                                        \
  T name(T* address, std::type_identity_t<T> value, tranche::sim::Site site = tranche::sim::Site::here()) { \
    return tranche::sim::atomic<T>(address, tranche::sim::AtomicOp::op, value, T{}, site);                  \
  }

TRANCHE_SIM_ATOMIC(atomicAdd, add)
TRANCHE_SIM_ATOMIC(atomicMin, min)
TRANCHE_SIM_ATOMIC(atomicMax, max)
TRANCHE_SIM_ATOMIC(atomicExch, exchange)
TRANCHE_SIM_ATOMIC(atomicAnd, bit_and)
TRANCHE_SIM_ATOMIC(atomicOr, bit_or)
TRANCHE_SIM_ATOMIC(atomicXor, bit_xor)
TRANCHE_SIM_ATOMIC(atomicInc, increment)
TRANCHE_SIM_ATOMIC(atomicDec, decrement)
#undef TRANCHE_SIM_ATOMIC

template <class T>
T atomicSub(T* address, std::type_identity_t<T> value, tranche::sim::Site site = tranche::sim::Site::here()) {
  return tranche::sim::atomic<T>(address, tranche::sim::AtomicOp::add, T(T{} - value), T{}, site);
}

template <class T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value,
            tranche::sim::Site site = tranche::sim::Site::here()) {
  return tranche::sim::atomic<T>(address, tranche::sim::AtomicOp::compare_exchange, value, compare, site);
}
