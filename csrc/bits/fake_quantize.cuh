// What the CUDA kernels of both fake-quantization ops share.
#pragma once

#include "bits/fake_quantize.h"
#include "core/launch.cuh"

namespace tranche {

constexpr int kFakeThreads = 256;

template <class T>
__device__ __forceinline__ float widened(T x) {
  return to_float(x);
}
__device__ __forceinline__ double widened(double x) { return x; }

template <class T>
__device__ __forceinline__ void narrow_to(T& to, float x) {
  to = from_float<T>(x);
}
__device__ __forceinline__ void narrow_to(double& to, double x) { to = x; }

// The sum of a block's threads, to thread 0: lanes, then warps, in one order.
template <class C>
__device__ __forceinline__ C block_sum(C x, C* shared) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  for (int step = 16; step > 0; step /= 2) x = x + __shfl_xor_sync(0xffffffffu, x, step);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  C total = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kFakeThreads / 32; ++i) total = total + shared[i];
  }
  __syncthreads();
  return total;
}

}  // namespace tranche
