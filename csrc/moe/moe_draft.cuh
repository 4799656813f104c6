// The draft head. With two experts, both chosen, nothing waits for the gate before the experts' outputs are
// added up: blocks of the gate, one for each token, run beside those of gate-and-up. With more experts the
// gate is a kernel of its own.
#pragma once

#include "moe/moe_choice.cuh"
#include "moe/moe_draft.h"
#include "moe/moe_experts.cuh"

namespace tranche {

__device__ __forceinline__ void softmax_of_two(float l0, float l1, float* out) {
  const float highest = l0 < l1 ? l1 : l0;
  const float e0 = expf(l0 - highest), e1 = expf(l1 - highest);
  out[0] = e0 / (e0 + e1);
  out[1] = e1 / (e0 + e1);
}

template <class T>
__device__ void contrast_coefficients(const MoeDraftParams& p, const float* logits, float* contrast) {
  const float l0 = logits[p.experts], l1 = logits[p.experts + 1];
  // the sign of the whole row hangs on this: it is decided as the published code does, in the tensor's own
  // type
  const float sign = to_float(from_float<T>(l0)) > to_float(from_float<T>(l1)) ? 1.0f : -1.0f;
  softmax_of_two(l0, l1, contrast);
  contrast[0] *= sign;
  contrast[1] *= -sign;
  for (int k = 2; k < p.top_k; ++k) contrast[k] = 0.0f;
}

// The gate of one token where both experts are chosen. `logits` is scratch for the router's rows.
template <class T>
__device__ void both_chosen(const MoeDraftParams& p, int token, float* logits) {
  token_logits(static_cast<const T*>(p.x) + token * p.x_stride, static_cast<const T*>(p.router),
               p.router_stride, p.rows, p.hidden, logits);
  __syncthreads();
  if (threadIdx.x != 0) return;
  float* plain = static_cast<float*>(p.coefficients) + int64_t(token) * p.top_k;
  float* contrast = plain + int64_t(p.tokens) * p.top_k;
  int32_t* ids = p.ids + int64_t(token) * p.top_k;
  ids[0] = 0;
  ids[1] = 1;
  if (p.variant == DraftVariant::star) {
    const float first = logits[0] > logits[1] ? 1.0f : 0.0f;
    plain[0] = contrast[1] = first;
    plain[1] = contrast[0] = 1.0f - first;
    return;
  }
  softmax_of_two(logits[0], logits[1], plain);
  if (p.outputs > 1) contrast_coefficients<T>(p, logits, contrast);
}

// Blocks of both experts' gates in front of the features' blocks.
__device__ __host__ __forceinline__ int gate_blocks(const MoeDraftParams& p) { return (p.tokens + 1) / 2; }

// Grid: blocks of the gate, then of features; experts.
template <class T, int kColumnTiles>
__global__ void __launch_bounds__(MoeExpertsTraits::kThreads) moe_draft_up_kernel(MoeDraftParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const int block = int(blockIdx.x), gates = gate_blocks(p);
  float* scratch = dynamic_smem<float>();
  if (block < gates) {
    const int token = 2 * block + int(blockIdx.y);
    if (token < p.tokens) both_chosen<T>(p, token, scratch);
    return;
  }
  gate_up_block<T, T, kColumnTiles>(p.experts_of, int(blockIdx.y), block - gates, scratch);
}

// Grid: tokens.
template <class T>
__global__ void __launch_bounds__(MoeChoiceTraits::kThreads) moe_draft_gate_kernel(MoeDraftParams p) {
  SHARED(float, logits, MoeChoiceTraits::kMaxRows);
  SHARED(float, ranking, MoeChoiceTraits::kMaxRows);
  SHARED(float, groups, MoeChoiceTraits::kMaxRows);
  ptx::grid_launch_dependents();
  const int64_t token = blockIdx.x;
  token_logits(static_cast<const T*>(p.x) + token * p.x_stride, static_cast<const T*>(p.router),
               p.router_stride, p.rows, p.hidden, logits);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  float* plain = static_cast<float*>(p.coefficients) + token * p.top_k;
  float* contrast = plain + int64_t(p.tokens) * p.top_k;
  if (p.outputs > 1 && threadIdx.x == 0) contrast_coefficients<T>(p, logits, contrast);
  __syncwarp();
  MoeRouteParams route{};
  route.experts = p.experts;
  route.top_k = p.top_k;
  route.groups = route.top_groups = 1;
  route.score = RouteScore::softmax;
  route.renormalize = true;
  route.scale = 1.0f;
  choose_experts(route, logits, ranking, groups, plain, p.ids + token * p.top_k);
}

static_assert(MoeExpertsTraits::kThreads == MoeChoiceTraits::kThreads, "one kernel has blocks of both");

}  // namespace tranche
