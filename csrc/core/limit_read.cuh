// One block per part, 16 bytes a thread, four loads in flight each.
#pragma once

#include "core/limit_read.h"
#include "core/ptx.cuh"

namespace tranche {

struct LimitReadTraits {
  static constexpr int kThreads = 256;
  static constexpr int kLoads = 4;
};

__global__ void __launch_bounds__(LimitReadTraits::kThreads) limit_read_kernel(LimitReadParams p) {
  constexpr int kThreads = LimitReadTraits::kThreads, kLoads = LimitReadTraits::kLoads;
  SHARED(uint64_t, sums, kThreads / 32);
  const int64_t vectors = p.words / 2;
  const int64_t begin = vectors * blockIdx.x / p.parts, end = vectors * (blockIdx.x + 1) / p.parts;
  const uint4* source = reinterpret_cast<const uint4*>(p.buffer);

  uint64_t sum = 0;
  for (int64_t first = begin + threadIdx.x; first < end; first += kLoads * kThreads) {
    uint4 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t at = first + i * kThreads;
      loaded[i] = at < end ? ptx::load_streaming_16(source + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      sum ^= (uint64_t(loaded[i].y) << 32 | loaded[i].x) ^ (uint64_t(loaded[i].w) << 32 | loaded[i].z);
    }
  }
  for (int lane = 16; lane > 0; lane /= 2) sum ^= __shfl_xor_sync(0xffffffffu, sum, lane);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) sum ^= sums[warp];
    p.checksum[blockIdx.x] = sum;
  }
}

}  // namespace tranche
