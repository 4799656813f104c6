// One token's logits, and its choice of experts; shared by moe_route and moe_draft. A block serves one token.
#pragma once

#include <math.h>

#include "moe/moe_load.cuh"
#include "moe/moe_route.h"

namespace tranche {

struct MoeChoiceTraits {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kMaxRows = kMaxExperts + 2;
};

constexpr float kLargestFloat = 3.4028234663852886e38f;

__device__ __forceinline__ float no_rank() { return -INFINITY; }

// logits[r] = <x, router[r]>: a warp per row; lane l sums elements 8 l .. 8 l + 7 of each 256, a tree adds
// lanes.
template <class T>
__device__ void token_logits(const T* x, const T* router, int64_t router_stride, int rows, int hidden,
                             float* logits) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int r = warp; r < rows; r += MoeChoiceTraits::kWarps) {
    const T* row = router + r * router_stride;
    float sum = 0.0f;
    for (int k = 8 * lane; k < hidden; k += 256) {
      const Eight<T> a = load_eight<T>(row, k, hidden), b = load_eight<T>(x, k, hidden);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(value_of(a, i), value_of(b, i), sum);
    }
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) logits[r] = sum;
  }
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int distance = 16; distance > 0; distance /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

// Logits become scores, and what experts are ranked by; one warp.
__device__ inline void token_scores(const MoeRouteParams& p, float* scores, float* ranking) {
  const int lane = int(threadIdx.x) % 32;
  float highest = no_rank();
  for (int e = lane; e < p.experts; e += 32) {
    const float l = scores[e];
    const float bounded = fminf(fmaxf(l, -kLargestFloat), kLargestFloat);
    scores[e] = isnan(l) ? no_rank() : bounded;
    highest = fmaxf(highest, scores[e]);
  }
  highest = warp_max(highest);
  const bool huge = highest > 1e15f;  // squares of such logits would overflow
  const float unit = huge ? highest : 1.0f;
  float total = 0.0f;
  for (int e = lane; e < p.experts; e += 32) {
    const bool dead = scores[e] == no_rank();
    float s = scores[e];
    if (p.score == RouteScore::softmax) s = dead ? 0.0f : expf(s - highest);
    if (p.score == RouteScore::sigmoid) s = dead ? 0.0f : 1.0f / (1.0f + expf(-s));
    if (p.score == RouteScore::relu_rms) s = s > 0.0f ? s / unit : 0.0f;
    total += p.score == RouteScore::relu_rms ? s * s : s;
    scores[e] = s;
    ranking[e] = dead ? no_rank() : 0.0f;
  }
  total = warp_sum(total);
  const float factor = p.score == RouteScore::softmax ? (total > 0.0f ? 1.0f / total : 0.0f)
                       : p.score == RouteScore::relu_rms
                           ? 1.0f / sqrtf(total / float(p.experts) + p.eps / unit / unit)
                           : 1.0f;
  for (int e = lane; e < p.experts; e += 32) {
    float s = scores[e] * factor;
    if (p.score == RouteScore::relu_rms && p.rms_weight) s *= p.rms_weight[e];
    const float rank = p.bias ? s + p.bias[e] : s;
    if (ranking[e] != no_rank()) ranking[e] = isnan(rank) ? no_rank() : rank;
    scores[e] = s;
  }
  __syncwarp();
}

// The lowest index of the largest of values[0..n) that are not NaN, which becomes NaN; the same on all lanes.
__device__ inline int take_best(float* values, int n) {
  const int lane = int(threadIdx.x) % 32;
  float best = no_rank();
  int index = n;  // worse than any
  for (int i = lane; i < n; i += 32) {
    const float v = values[i];
    if (!isnan(v) && (index == n || v > best)) {
      best = v;
      index = i;
    }
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, best, distance);
    const int other_index = __shfl_xor_sync(0xffffffffu, index, distance);
    const bool better =
        other_index < n && (index == n || other > best || (other == best && other_index < index));
    if (better) {
      best = other;
      index = other_index;
    }
  }
  __syncwarp();
  if (lane == 0) values[index] = NAN;
  __syncwarp();
  return index;
}

// Experts outside the best groups become NaN, which is never chosen. `groups` is scratch [p.groups].
__device__ inline void keep_top_groups(const MoeRouteParams& p, float* ranking, float* groups) {
  if (p.top_groups >= p.groups) return;
  const int lane = int(threadIdx.x) % 32, size = p.experts / p.groups;
  for (int g = lane; g < p.groups; g += 32) {
    float best = no_rank(), second = no_rank();
    for (int e = g * size; e < (g + 1) * size; ++e) {
      const float rank = ranking[e];
      if (rank > best) {
        second = best;
        best = rank;
      } else if (rank > second) {
        second = rank;
      }
    }
    const float sum = size > 1 ? best + second : best;
    groups[g] = isnan(sum) ? no_rank() : sum;
  }
  __syncwarp();
  for (int n = 0; n < p.top_groups; ++n) take_best(groups, p.groups);
  for (int e = lane; e < p.experts; e += 32) {
    if (!isnan(groups[e / size])) ranking[e] = NAN;
  }
  __syncwarp();
}

// One warp: the K best experts of the token, from its logits. `weights` and `ids` are the token's own.
__device__ inline void choose_experts(const MoeRouteParams& p, float* logits, float* ranking, float* groups,
                                      float* weights, int32_t* ids) {
  const int lane = int(threadIdx.x) % 32;
  token_scores(p, logits, ranking);
  keep_top_groups(p, ranking, groups);
  float total = 0.0f;
  for (int k = 0; k < p.top_k; ++k) {
    const int e = take_best(ranking, p.experts);
    total += logits[e];
    if (lane == 0) ids[k] = e;
    if (lane == 0) weights[k] = logits[e];
  }
  if (lane != 0) return;
  for (int k = 0; k < p.top_k; ++k) {
    float w = weights[k];
    if (p.renormalize) w = total != 0.0f ? w / total : 0.0f;
    weights[k] = w * p.scale;
  }
}

}  // namespace tranche
