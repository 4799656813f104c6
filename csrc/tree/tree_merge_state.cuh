// One warp per row: both weights in every lane, then D elements side by side.
#pragma once

#include "core/launch.cuh"
#include "tree/tree_merge_state.h"

namespace tranche {

struct TreeMergeStateTraits {
  static constexpr int kThreads = 128;
  static constexpr int kRows = kThreads / 32;
};

template <class T>
__global__ void __launch_bounds__(TreeMergeStateTraits::kThreads)
    tree_merge_state_kernel(TreeMergeStateParams p) {
  const int64_t row = int64_t(blockIdx.x) * TreeMergeStateTraits::kRows + threadIdx.x / 32;
  const int lane = int(threadIdx.x % 32);
  if (row >= p.rows) return;
  const int64_t head = row % p.heads, node = row / p.heads % p.nodes, b = row / p.heads / p.nodes;
  const T* x =
      static_cast<const T*>(p.out_a) + b * p.a_stride[0] + node * p.a_stride[1] + head * p.a_stride[2];
  const T* y =
      static_cast<const T*>(p.out_b) + b * p.b_stride[0] + node * p.b_stride[1] + head * p.b_stride[2];
  T* out = static_cast<T*>(p.out) + row * p.head_dim;
  const float infinity = __builtin_inff(), nan = bits_float(0x7fffffffu);
  const float lse_a = p.lse_a[row], lse_b = p.lse_b[row];

  if (lse_a == -infinity || lse_b == -infinity) {
    const T* seen = lse_a == -infinity ? y : x;
    const bool nothing = lse_a == -infinity && lse_b == -infinity;
    for (int d = lane; d < p.head_dim; d += 32) out[d] = nothing ? from_float<T>(0.0f) : seen[d];
    if (lane == 0) p.lse[row] = lse_a == -infinity ? lse_b : lse_a;
    return;
  }
  const float m = lse_a > lse_b ? lse_a : lse_b;
  const float e_a = expf(lse_a - m), e_b = expf(lse_b - m), sum = __fadd_rn(e_a, e_b);
  const float w_a = __fdiv_rn(e_a, sum), w_b = __fdiv_rn(e_b, sum);
  for (int d = lane; d < p.head_dim; d += 32) {
    const float z = __fadd_rn(__fmul_rn(w_a, to_float(x[d])), __fmul_rn(w_b, to_float(y[d])));
    out[d] = from_float<T>(z == z ? z : nan);
  }
  if (lane == 0) {
    const bool is_nan = lse_a != lse_a || lse_b != lse_b;
    p.lse[row] = is_nan ? nan : (m == infinity ? infinity : __fadd_rn(m, logf(sum)));
  }
}

}  // namespace tranche
