// The rule of typical acceptance, for the CPU and the GPU alike: what is left once rows have been read.
#pragma once

#include <cstdint>

#include "core/numeric.h"
#include "tree/tree_sampling.h"
#include "tree/tree_verify_typical.h"
#include "tree/tree_walk.h"

namespace tranche {

// 2^y of tokens at or below this is left out of sums: it would be subnormal.
constexpr float kLeastTypicalExponent = -126.0f;

// From the sums over all tokens of 2^y and of y * 2^y, and log2 of the first. Without any token (log_sum is
// -inf) nothing is accepted.
TRANCHE_HD TypicalRow typical_row(const TreeVerifyTypicalParams& p, float max, float sum, float moment,
                                  float log_sum) {
  const float log_inverse_entropy = sum > 0.0f ? moment / sum - log_sum : 0.0f;  // log2 of exp(-H), at most 0
  const float exponent = log_inverse_entropy < 0.0f ? log_inverse_entropy : 0.0f;
  const float inverse_entropy = exponent > kLeastTypicalExponent ? exp2_of(exponent) : 0.0f;
  const float adaptive = p.delta * inverse_entropy;
  return {max, log_sum, adaptive < p.epsilon ? adaptive : p.epsilon};
}

// log2 p of the edge to a child with this token, NaN where it is not taken.
template <class T>
TRANCHE_HD float typical_edge(const TreeVerifyTypicalParams& p, const TypicalRow& row, const T* logits,
                              int64_t token) {
  const float refused = bits_float(0x7fc00000u);
  if (token < 0 || token >= p.vocab) return refused;
  const float y = exponent_of(to_float(logits[token]), {row.max, p.factor});
  const float exponent = y - row.log_sum;
  if (!(exponent > kLeastTypicalExponent)) return refused;
  const float probability = exp2_of(exponent < 0.0f ? exponent : 0.0f);
  return probability > row.threshold ? exponent : refused;
}

// The path through taken edges to the best node: the deepest, of equally deep ones that of the greatest sum
// of edges, of these the first. On entry `sums` holds the edges and `depths` the parents of the nodes in use;
// they are overwritten. One thread's work.
TRANCHE_HD void typical_path(const TreeVerifyTypicalParams& p, int64_t b, float* sums, int32_t* depths) {
  const int64_t row = b * p.nodes;
  const int32_t count = clamped_count(p.n_nodes[b], p.nodes);
  int32_t best = count > 0 ? 0 : -1;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t parent = depths[i];
    const float edge = sums[i];
    const bool accepted = i == 0 || (depths[parent] >= 0 && edge == edge);
    depths[i] = accepted ? (i > 0 ? depths[parent] + 1 : 0) : -1;
    sums[i] = accepted && i > 0 ? sums[parent] + edge : 0.0f;
    const bool better = depths[i] > depths[best] || (depths[i] == depths[best] && sums[i] > sums[best]);
    if (better) best = i;
  }
  const int32_t on_path = best >= 0 ? depths[best] + 1 : 0;
  for (int32_t i = on_path; i < p.nodes; ++i) p.path[row + i] = -1;
  p.length[b] = on_path > 0 ? on_path - 1 : 0;
  p.next_token[b] = best >= 0 ? p.largest[row + best] : -1;
  for (int32_t node = best, at = on_path - 1; at >= 0; --at) {
    p.path[row + at] = node;
    node = node > 0 ? parent_of(p.parent + row, node) : 0;
  }
}

}  // namespace tranche
