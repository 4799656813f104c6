// The router: a block per token.
#pragma once

#include "moe/moe_choice.cuh"

namespace tranche {

template <class T>
__global__ void __launch_bounds__(MoeChoiceTraits::kThreads) moe_route_kernel(MoeRouteParams p) {
  SHARED(float, logits, MoeChoiceTraits::kMaxRows);
  SHARED(float, ranking, MoeChoiceTraits::kMaxRows);
  SHARED(float, groups, MoeChoiceTraits::kMaxRows);
  const int64_t token = blockIdx.x;
  token_logits(static_cast<const T*>(p.x) + token * p.x_stride, static_cast<const T*>(p.weight),
               p.weight_stride, p.experts, p.hidden, logits);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  choose_experts(p, logits, ranking, groups, static_cast<float*>(p.weights) + token * p.top_k,
                 p.ids + token * p.top_k);
}

}  // namespace tranche
