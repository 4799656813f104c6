// Sixteen numbers side by side, float or double, in the compiler's own vectors.
#pragma once

#include "core/numeric.h"
#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int kLanes = 16;

template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(kLanes * sizeof(A))));
};

// Their sum, by halves. By reference: passed by value they would depend on the instruction set's calling
// convention.
template <class A>
TRANCHE_INLINE A sum_of(const typename LanesOf<A>::type& x) {
  const auto eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four =
      __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

}  // namespace tranche::cpu::TRANCHE_ISA
