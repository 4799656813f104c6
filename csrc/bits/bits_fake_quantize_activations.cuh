// A block takes whole chunks; one more block adds their sums.
#pragma once

#include "bits/bits_fake_quantize_activations.h"
#include "bits/fake_quantize.cuh"

namespace tranche {

template <class T, bool backward>
__global__ void __launch_bounds__(kFakeThreads)
    bits_fake_quantize_activations_kernel(BitsFakeQuantizeActivationsParams p) {
  using C = typename compute_type<T>::type;
  SHARED(C, shared, kFakeThreads / 32);
  const C scale = *static_cast<const C*>(p.scale), top = C((1 << p.bits) - 1);
  const C zero = p.zero ? *static_cast<const C*>(p.zero) : C(0);
  for (int64_t chunk = blockIdx.x; chunk < p.chunks; chunk += gridDim.x) {
    const int64_t end = (chunk + 1) * kFakeChunk < p.count ? (chunk + 1) * kFakeChunk : p.count;
    C by_scale = 0, by_zero = 0;
    for (int64_t at = chunk * kFakeChunk + threadIdx.x; at < end; at += kFakeThreads) {
      const GridActivation<C> on =
          activation_on_grid<C>(widened(static_cast<const T*>(p.x)[at]), scale, zero, top);
      T& out = static_cast<T*>(p.out)[at];
      if constexpr (backward) {
        const C grad = widened(static_cast<const T*>(p.grad)[at]);
        narrow_to(out, on.inside ? grad : C(0));
        by_scale += grad * on.by_scale;
        by_zero += grad * on.by_zero;
      } else {
        narrow_to(out, on.value);
      }
    }
    if constexpr (backward) {
      by_scale = block_sum(by_scale, shared);
      by_zero = block_sum(by_zero, shared);
      if (threadIdx.x == 0) {
        static_cast<double*>(p.partial)[2 * chunk] = double(by_scale);
        static_cast<double*>(p.partial)[2 * chunk + 1] = double(by_zero);
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kFakeThreads)
    bits_fake_quantize_activations_sum_kernel(BitsFakeQuantizeActivationsParams p) {
  SHARED(double, shared, kFakeThreads / 32);
  double by_scale = 0, by_zero = 0;
  for (int64_t chunk = threadIdx.x; chunk < p.chunks; chunk += kFakeThreads) {
    by_scale += static_cast<const double*>(p.partial)[2 * chunk];
    by_zero += static_cast<const double*>(p.partial)[2 * chunk + 1];
  }
  by_scale = block_sum(by_scale, shared);
  by_zero = block_sum(by_zero, shared);
  if (threadIdx.x == 0) {
    *static_cast<C*>(p.grad_scale) = C(by_scale);
    *static_cast<C*>(p.grad_zero) = C(by_zero);
  }
}

}  // namespace tranche
