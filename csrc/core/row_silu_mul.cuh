// One thread per element; blocks walk over parts of rows.
#pragma once

#include "core/launch.cuh"
#include "core/row_silu_mul.h"

namespace tranche {

struct RowSiluMulTraits {
  static constexpr int kThreads = 256;
};

template <class T>
__global__ void __launch_bounds__(RowSiluMulTraits::kThreads) row_silu_mul_kernel(RowSiluMulParams p) {
  const int64_t i = int64_t(blockIdx.y) * RowSiluMulTraits::kThreads + threadIdx.x;
  if (i >= p.width) return;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float x = to_float(static_cast<const T*>(p.gate)[row * p.gate_stride + i]);
    const float y = to_float(static_cast<const T*>(p.up)[row * p.up_stride + i]);
    const float silu = __fdiv_rn(x, __fadd_rn(1.0f, expf(-x)));
    static_cast<T*>(p.out)[row * p.width + i] = from_float<T>(__fmul_rn(silu, y));
  }
}

}  // namespace tranche
