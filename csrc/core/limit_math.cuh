// Every warp keeps eight accumulators busy: with 32 warps a multiprocessor, more than the pipelines need.
#pragma once

#include "core/limit_math.h"
#include "core/ptx.cuh"

namespace tranche {

struct LimitMathTraits {
  static constexpr int kThreads = 256;
  static constexpr int kChains = 8;
};

template <MathKind kind>
__global__ void __launch_bounds__(LimitMathTraits::kThreads) limit_math_kernel(LimitMathParams p) {
  constexpr int kChains = LimitMathTraits::kChains, kWarps = LimitMathTraits::kThreads / 32;
  SHARED(float, sums, LimitMathTraits::kThreads);
  double operations = 0;
  float sum = 0;
  if constexpr (kind == MathKind::fp32) {
    float chain[kChains] = {};
    const float a = 0.999f + 1e-9f * float(threadIdx.x);
    for (int64_t i = 0; i < p.iterations; ++i) {
#pragma unroll
      for (int c = 0; c < kChains; ++c) chain[c] = fmaf(chain[c], a, 0.5f);
    }
    for (float c : chain) sum += c;
    operations = 2.0 * 32 * kWarps * kChains;
  } else if constexpr (kind == MathKind::bf16) {
    float chain[kChains][4] = {};
    const uint32_t a[4] = {0x3f003f00u, threadIdx.x, 0x3f003f00u, threadIdx.x},
                   b[2] = {0x3f003f00u, threadIdx.x};
    for (int64_t i = 0; i < p.iterations; ++i) {
#pragma unroll
      for (int c = 0; c < kChains; ++c) ptx::mma_m16n8k16<bf16>(chain[c], a, b);
    }
    for (auto& c : chain) sum += c[0];
    operations = 2.0 * 16 * 8 * 16 * kWarps * kChains;
  } else {
    int32_t chain[kChains][4] = {};
    const uint32_t a[4] = {0x01020304u, threadIdx.x, 0x01020304u, threadIdx.x},
                   b[2] = {0x01020304u, threadIdx.x};
    for (int64_t i = 0; i < p.iterations; ++i) {
#pragma unroll
      for (int c = 0; c < kChains; ++c) ptx::mma_m16n8k32<int8_t>(chain[c], a, b);
    }
    for (auto& c : chain) sum += float(c[0]);
    operations = 2.0 * 16 * 8 * 32 * kWarps * kChains;
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < LimitMathTraits::kThreads; ++i) sum += sums[i];
    p.results[2 * blockIdx.x] = operations * double(p.iterations);
    p.results[2 * blockIdx.x + 1] = sum;
  }
}

}  // namespace tranche
