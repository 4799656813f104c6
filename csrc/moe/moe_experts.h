// The experts of each token and their weighted sum: what a kernel of this op receives. moe_draft runs on the
// same kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bits/packed.h"
#include "core/numeric.h"

namespace tranche {

enum class Activation : int32_t { silu, gelu, relu };

// One stack of matrices: expert e's row r starts at data + (e * stride[0] + r * stride[1]) elements.
struct ExpertMatrices {
  const void* data;    // [E, rows, columns], of Params::type or int8, or packed weights; null: there is none
  const float* scale;  // [E, rows] contiguous: what rows of integers are multiplied with; null: no integers
  int64_t stride[2];   // of packed weights the first alone, in bytes
};

// What a kernel takes for the type of weights in the layout of bits/packed.h.
struct Packed {};

TRANCHE_HD PackedWeight packed_expert(const ExpertMatrices& m, int expert, int rows, int columns, int bits) {
  PackedWeight w{};
  w.data = static_cast<const uint8_t*>(m.data) + expert * m.stride[0];
  w.out_features = rows;
  w.in_features = columns;
  w.row_tiles = (rows + kTileRows - 1) / kTileRows;
  w.input_tiles = (columns + kTileInputs - 1) / kTileInputs;
  w.bits = bits;
  w.planes = planes_of_bits(bits, w.single);
  return w;
}

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
  int32_t bits;  // to compute packed weights in; 0: they are not packed
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
