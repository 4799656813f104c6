// Choosing a draft tree from the candidates of all levels: what a kernel of this op receives.
#pragma once

#include <cstdint>

#include "core/numeric.h"
#include "tree/tree_ancestors.h"

namespace tranche {

constexpr int kMaxCandidates = 8192;  // C

// Sizes: B trees of N nodes at most, C candidates each, W = ceil(N/64) words.
//
// The key of a candidate is the least score on its path, so that no candidate's exceeds its parent's; NaN
// counts as -inf. The min(N - 1, C) candidates with the greatest (key, lower index) are kept: with a
// candidate comes its parent, whose key is no less and whose index is lower. Nodes 1, 2, ... are the kept
// candidates in order of index. A parent that is no earlier candidate (the cpu backend refuses it unless it
// is -1) counts as the root.
struct TreeSelectParams {
  const void* scores;          // [B, C] float, or double on the CPU
  const int32_t* parents;      // [B, C] candidate, or -1 for a child of the root
  const int64_t* tokens;       // [B, C]
  const int64_t* root_tokens;  // [B]
  int32_t* parent;             // [B, N] out: node; -1 at the root and past n_nodes
  int32_t* n_nodes;            // [B] out
  int32_t* depth;              // [B, N] out
  int64_t* ancestors;          // [B, N, W] out
  int64_t* node_tokens;        // [B, N] out: 0 past n_nodes
  int32_t* index;              // [B, N] out: candidate; -1 at the root and past n_nodes

  int32_t batch, candidates, nodes, words;
  DType type;  // of scores
};

TRANCHE_HD int32_t kept_candidates(const TreeSelectParams& p) {
  return p.nodes - 1 < p.candidates ? p.nodes - 1 : p.candidates;
}

namespace cpu {
void tree_select(const TreeSelectParams&);
}  // namespace cpu

namespace cuda {
void tree_select(const TreeSelectParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
