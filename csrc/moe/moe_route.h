// The router: logits, scores, and each token's best experts. What a kernel of this op receives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/numeric.h"

namespace tranche {

enum class RouteScore : int32_t {
  softmax,
  sigmoid,
  relu_rms,  // RMSNorm(ReLU(logits)) * rms_weight
};

constexpr int kMaxExperts = 1024;

// Sizes: T tokens, H hidden, E <= kMaxExperts experts, K <= E chosen.
//
// Logits that are not finite: +-Inf counts as the largest finite number, NaN has score 0 and ranks below all
// others. An expert whose score is NaN for another reason (its bias) ranks there too. Ties go to the lower
// id.
struct MoeRouteParams {
  const void* x;            // [T, H] of `type`
  const void* weight;       // [E, H] of `type`
  const float* bias;        // [E] or null: added to the score for the choice, not for the weight
  const float* rms_weight;  // [E] or null: ones
  void* weights;            // [T, K] out: fp32, or fp64 when `type` is
  int32_t* ids;             // [T, K] out: by descending biased score
  void* workspace;

  int64_t x_stride, weight_stride;  // of a row, in elements; rows are contiguous
  int32_t tokens, hidden, experts, top_k;
  int32_t groups,
      top_groups;  // the E experts are `groups` runs of equal length; only the best ones may choose
  RouteScore score;
  bool renormalize;
  float scale, eps;
  DType type;
};

namespace cpu {
size_t moe_route_workspace(const MoeRouteParams&);
void moe_route(const MoeRouteParams&);
}  // namespace cpu

namespace cuda {
size_t moe_route_workspace(const MoeRouteParams&);
void moe_route(const MoeRouteParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
