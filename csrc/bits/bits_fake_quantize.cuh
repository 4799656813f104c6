// A block is one group: its weights strided over the threads, its scale's gradient summed in a fixed order.
#pragma once

#include "bits/bits_fake_quantize.h"
#include "bits/fake_quantize.cuh"

namespace tranche {

template <class T, bool backward>
__global__ void __launch_bounds__(kFakeThreads) bits_fake_quantize_kernel(BitsFakeQuantizeParams p) {
  using C = typename compute_type<T>::type;
  SHARED(C, shared, kFakeThreads / 32);
  const WeightGrid<C> grid = weight_grid<C>(p.bits, p.stored_bits);
  const int64_t groups = p.rows * p.groups;
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const C scale = static_cast<const C*>(p.scale)[group];
    C sum = 0;
    for (int64_t i = threadIdx.x; i < p.group_size; i += kFakeThreads) {
      const int64_t at = group * p.group_size + i;
      const GridWeight<C> on = weight_on_grid<C>(widened(static_cast<const T*>(p.w)[at]), scale, grid);
      T& out = static_cast<T*>(p.out)[at];
      if constexpr (backward) {
        const C grad = widened(static_cast<const T*>(p.grad)[at]);
        narrow_to(out, on.inside ? grad : C(0));
        sum += grad * on.slope;
      } else {
        narrow_to(out, on.code * scale);
      }
    }
    if constexpr (backward) {
      sum = block_sum(sum, shared);
      if (threadIdx.x == 0) static_cast<C*>(p.grad_scale)[group] = sum;
    }
  }
}

}  // namespace tranche
