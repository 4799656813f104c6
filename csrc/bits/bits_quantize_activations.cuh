// A block quantises one row: the largest magnitude as an integer, then codes, 32 to a warp at a time, whose
// sums go to their group's by an integer atomic.
#pragma once

#include "bits/bits_quantize_activations.h"
#include "core/launch.cuh"

namespace tranche {

constexpr int kQuantizeThreads = 256;

__device__ __forceinline__ float activation(const BitsQuantizeActivationsParams& p, int64_t at) {
  if (p.x_type == DType::f32) return static_cast<const float*>(p.x)[at];
  if (p.x_type == DType::f16) return to_float(static_cast<const half*>(p.x)[at]);
  return to_float(static_cast<const bf16*>(p.x)[at]);
}

__global__ void __launch_bounds__(kQuantizeThreads)
    bits_quantize_activations_kernel(BitsQuantizeActivationsParams p) {
  constexpr int kWarps = kQuantizeThreads / 32;
  SHARED(uint32_t, warp_largest, kWarps);
  const int64_t row = blockIdx.x;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const bool in_use = row < p.rows;  // the same for the whole block
  const int64_t first = row * p.x_stride;

  uint32_t largest = 0;
  if (in_use && !p.x_is_codes) {
    for (int64_t i = thread; i < p.inputs; i += kQuantizeThreads) {
      largest = max(largest, float_bits(activation(p, first + i)) & 0x7fffffffu);
    }
  }
  largest = __reduce_max_sync(0xffffffffu, largest);
  if (lane == 0) warp_largest[warp] = largest;
  if (in_use) {
    for (int64_t g = thread; g < p.groups; g += kQuantizeThreads) p.row_sum[row * p.groups + g] = 0;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) largest = max(largest, warp_largest[w]);

  const bool finite = largest < 0x7f800000u;
  const float absmax = bits_float(largest);
  const float inverse = __fdiv_rn(127.0f, absmax > kSmallestAbsmax ? absmax : kSmallestAbsmax);
  if (in_use && !p.x_is_codes && thread == 0) {
    p.scale[row] = finite ? __fdiv_rn(absmax, 127.0f) : bits_float(0x7fc00000u);
  }
  const int64_t group = p.inputs / p.groups;
  for (int64_t start = warp * 32; start < p.padded_inputs; start += kQuantizeThreads) {
    const int64_t i = start + lane;
    int32_t code = 0;
    if (in_use && i < p.inputs) {
      if (p.x_is_codes) {
        code = static_cast<const int8_t*>(p.x)[first + i];
      } else if (finite) {
        code = __float2int_rn(__fmul_rn(activation(p, first + i), inverse));
        code = max(-127, min(127, code));
      }
    }
    if (i < p.padded_inputs) p.codes[code_offset(p, row, i)] = int8_t(code);
    const int32_t sum = __reduce_add_sync(0xffffffffu, code);
    // groups are multiples of 32 inputs, or one
    if (lane == 0 && in_use && start < p.inputs) atomicAdd(&p.row_sum[row * p.groups + start / group], sum);
  }
}

}  // namespace tranche
