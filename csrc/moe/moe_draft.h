// The draft head: its gate, from logits to the coefficients of both outputs, and its experts. What a kernel
// of this op receives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "moe/moe_experts.h"

namespace tranche {

enum class DraftVariant : int32_t {
  jakiro,  // E = K = 2
  topk,    // any E and K
  star,    // E = K = 2, no contrast rows: the unweighted experts, the one of the larger logit first
};

// Sizes: T tokens, H hidden, E experts, K choices, R router rows (E, or E + 2 with the contrast rows), P
// outputs.
//
// jakiro: ids are 0, 1; coefficients[0] = softmax(l[0:2]); coefficients[1] = s * (b0, -b1) with
// b = softmax(l[2:4]) and s = +1 if l2 > l3 else -1, compared after rounding to `type`.
// topk: ids and coefficients[0] as MoeRouteParams gives them (softmax of the chosen logits); coefficients[1]
// as above with l[E:E+2], on the first two choices, 0 for the others.
struct MoeDraftParams {
  const void* x;       // [T, H]
  const void* router;  // [R, H]
  void* coefficients;  // [P, T, K] out: fp32, or fp64 when `type` is
  int32_t* ids;        // [T, K] out
  void* workspace;

  int64_t x_stride, router_stride;
  int32_t tokens, hidden, experts, rows, top_k, outputs;
  DraftVariant variant;
  DType type;

  MoeExpertsParams experts_of;  // CUDA only: the experts, with the gate's coefficients
};

// On the CPU the gate alone.
namespace cpu {
size_t moe_draft_workspace(const MoeDraftParams&);
void moe_draft(const MoeDraftParams&);
}  // namespace cpu

namespace cuda {
size_t moe_draft_workspace(const MoeDraftParams&);
void moe_draft(const MoeDraftParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
