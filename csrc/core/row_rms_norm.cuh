// One block per row, of a size that nothing changes: each thread sums its elements in order, a warp by a
// fixed exchange, and every thread adds up the warps' sums in the same order.
#pragma once

#include "core/launch.cuh"
#include "core/row_rms_norm.h"

namespace tranche {

struct RowRmsNormTraits {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
};

template <class T>
__global__ void __launch_bounds__(RowRmsNormTraits::kThreads) row_rms_norm_kernel(RowRmsNormParams p) {
  using Traits = RowRmsNormTraits;
  SHARED(float, warp_sum, Traits::kWarps);
  const int thread = int(threadIdx.x);
  const T* x = static_cast<const T*>(p.x) + int64_t(blockIdx.x) * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + int64_t(blockIdx.x) * p.width;

  float sum = 0.0f;
  for (int64_t i = thread; i < p.width; i += Traits::kThreads) {
    const float value = to_float(x[i]);
    sum = __fmaf_rn(value, value, sum);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, lanes));
  if (thread % 32 == 0) warp_sum[thread / 32] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int w = 0; w < Traits::kWarps; ++w) sum = __fadd_rn(sum, warp_sum[w]);

  const float mean = __fdiv_rn(sum, float(p.width));
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, p.epsilon)));
  for (int64_t i = thread; i < p.width; i += Traits::kThreads) {
    const T scaled = from_float<T>(__fmul_rn(to_float(x[i]), scale));
    out[i] = from_float<T>(__fmul_rn(to_float(weight[i]), to_float(scaled)));
  }
}

}  // namespace tranche
