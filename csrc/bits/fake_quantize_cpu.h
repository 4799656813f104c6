// Blocks of any stored type as the type to compute in, for the fake-quantization kernels.
#pragma once

#include "bits/fake_quantize.h"
#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int kFakeBlock = 64;

template <class T>
TRANCHE_INLINE void load_block(const T* from, float* to, int n) {
  row_to_float(from, to, n);
}
TRANCHE_INLINE void load_block(const double* from, double* to, int n) {
  __builtin_memcpy(to, from, size_t(n) * sizeof(double));
}

template <class T>
TRANCHE_INLINE void store_block(T* to, const float* from, int n) {
  for (int i = 0; i < n; ++i) to[i] = from_float<T>(from[i]);
}
TRANCHE_INLINE void store_block(double* to, const double* from, int n) {
  __builtin_memcpy(to, from, size_t(n) * sizeof(double));
}

// Sums kept apart by place modulo 8, so that they are a vector's and their order is everyone's.
struct LaneSums {
  double lanes[8] = {};

  template <class T>
  inline __attribute__((always_inline)) void add(const T (&terms)[kFakeBlock]) {
    for (int i = 0; i < kFakeBlock; i += 8) {
      for (int j = 0; j < 8; ++j) lanes[j] += double(terms[i + j]);
    }
  }
  inline __attribute__((always_inline)) double total() const {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
};

}  // namespace tranche::cpu::TRANCHE_ISA
