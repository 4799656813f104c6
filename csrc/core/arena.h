// Scratch memory for CPU kernels: arrays cut out of one allocation that the op file makes.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

TRANCHE_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
template <class T>
TRANCHE_INLINE T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
TRANCHE_INLINE T most(T a, T b) {
  return a > b ? a : b;
}

// Cuts one allocation into 64-byte aligned arrays. Without memory it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* result = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return result;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace tranche::cpu::TRANCHE_ISA
