// channel_gate on CUDA, after the kernel of channel_stats: a warp sums one row of the weight times the
// moments of one image, its lanes along the row, and adds them up by a fixed exchange.
#pragma once

#include "pconv/channel_gate.h"
#include "pconv/channel_stats.cuh"
#include "pconv/hardsigmoid.cuh"

namespace tranche {

struct ChannelGateTraits {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
};

// Block (x, y): rows from x * kWarps for image y, and for the images gridDim.y after it.
template <class T>
__global__ void __launch_bounds__(ChannelGateTraits::kThreads) channel_gate_kernel(ChannelGateParams p) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t n = p.stats.channels - p.stats.start;
  const int64_t row = int64_t(blockIdx.x) * ChannelGateTraits::kWarps + int(threadIdx.x) / 32;
  if (row >= n) return;  // whole warps
  const T* weight = static_cast<const T*>(p.weight) + row * 2 * n;
  for (int64_t b = blockIdx.y; b < p.stats.batch; b += gridDim.y) {
    const float* mean = static_cast<const float*>(p.stats.mean) + b * n;
    const float* std = static_cast<const float*>(p.stats.std) + b * n;
    float sum = 0.0f;
    for (int64_t k = lane; k < n; k += 32) {
      sum = fmaf(to_float(weight[k]), mean[k], sum);
      sum = fmaf(to_float(weight[n + k]), std[k], sum);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (lane == 0) {
      const float biased = sum + to_float(static_cast<const T*>(p.bias)[row]);
      static_cast<T*>(p.out)[b * n + row] = from_float<T>(hardsigmoid(biased));
    }
  }
}

}  // namespace tranche
