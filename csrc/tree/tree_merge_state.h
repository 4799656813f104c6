// Merging attention over two parts of a cache: what a kernel of this op receives.
//
// With m = max(lse_a, lse_b), e = exp(lse - m) of each side and w = e / (e_a + e_b):
//   out = w_a out_a + w_b out_b,   lse = m + log(e_a + e_b)
// each product and the sum rounded by itself (no fma), so that exchanging the sides changes no bit; a NaN
// result is the one canonical NaN. A side with lse -inf saw nothing: the result is the other side bit for
// bit; zeros and -inf if both are. An lse of +inf or NaN makes the row of out NaN, and lse +inf or NaN as
// logaddexp says.
#pragma once

#include <cstdint>

#include "core/numeric.h"

namespace tranche {

struct TreeMergeStateParams {
  const void* out_a;   // [B, N, Hq, D], type
  const float* lse_a;  // [B, N, Hq] natural logarithm, contiguous
  const void* out_b;
  const float* lse_b;
  void* out;   // [B, N, Hq, D], contiguous
  float* lse;  // [B, N, Hq], contiguous

  int64_t a_stride[3];  // of B, N, Hq; the last dimension is contiguous
  int64_t b_stride[3];
  int64_t rows;  // B * N * Hq
  int32_t nodes, heads, head_dim;
  DType type;
};

namespace cpu {
void tree_merge_state(const TreeMergeStateParams&);
}  // namespace cpu

namespace cuda {
void tree_merge_state(const TreeMergeStateParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
