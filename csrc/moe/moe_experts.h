// The experts of each token and their weighted sum: what a kernel of this op receives. moe_draft runs on the
// same kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/numeric.h"

namespace tranche {

enum class Activation : int32_t { silu, gelu, relu };

// One stack of matrices: expert e's row r starts at data + (e * stride[0] + r * stride[1]) elements.
struct ExpertMatrices {
  const void* data;    // [E, rows, columns], of Params::type or int8; null: there is none
  const float* scale;  // [E, rows] contiguous: what int8 rows are multiplied with; null: not int8
  int64_t stride[2];
};

// Sizes: T tokens, H hidden, I inner, E experts, K choices of each token, P <= 2 outputs.
//
// out[p][t] = residual[t] + sum over k of coefficient[p][t, k] * expert[ids[t, k]](x[t]), where
// expert[e](x) = down[e] (act(gate[e] x) * (up[e] x)), or down[e] act(up[e] x) without gate. The sum runs in
// fp32 by ascending expert; a coefficient of exactly 0 leaves its term out, whatever the expert yields.
struct MoeExpertsParams {
  const void* x;                  // [T, H]
  ExpertMatrices gate, up, down;  // [E, I, H], [E, I, H], [E, H, I]
  const void* coefficients;       // [P, T, K] contiguous: fp32, or fp64 when `type` is
  const int32_t* offsets;         // [E + 1] as moe_plan gives them; on CUDA null: the kernels make the plan
  const int32_t* slots;           // [T * K]
  const int32_t* ids;             // [T, K], of which; null too: K == E and the k-th choice is expert k
  const void* residual;           // [T, H] or null
  void* out[2];                   // [T, H] contiguous
  void* workspace;

  int64_t x_stride, residual_stride;  // of a row, in elements
  int32_t tokens, hidden, inner, experts, top_k, outputs;
  Activation activation;
  DType type;
};

namespace cpu {
size_t moe_experts_workspace(const MoeExpertsParams&);
void moe_experts(const MoeExpertsParams&);
}  // namespace cpu

namespace cuda {
size_t moe_experts_workspace(const MoeExpertsParams&);
void moe_experts(const MoeExpertsParams&, void* stream);
// moe_experts after a kernel of the same op, which it may overlap, and the second of its two kernels alone.
void moe_experts_after(const MoeExpertsParams&, void* stream);
void moe_experts_down(const MoeExpertsParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
