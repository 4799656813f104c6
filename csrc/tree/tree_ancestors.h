// Ancestor bits and depths of draft trees, from their parent lists: what a kernel of this op receives.
#pragma once

#include <cstdint>

namespace tranche {

// Sizes: B trees, N <= 1024 nodes per tree at most, W = ceil(N/64) words.
//
// Node 0 is the root, whatever its parent entry says (-1 by contract). For i > 0 a valid parent lies in
// [0, i). An invalid one, which the op refuses on the cpu backend before a kernel runs, counts as 0: the node
// hangs under the root. n_nodes is clamped to [0, N]. Rows from n_nodes on get no bits and depth 0.
struct TreeAncestorsParams {
  const int32_t* parent;   // [B, N]
  const int32_t* n_nodes;  // [B] nodes in use
  int64_t*
      ancestors;   // [B, N, W] out: bit j%64 of word j/64 is set when j is i or an ancestor of i; contiguous
  int32_t* depth;  // [B, N] out: root 0; contiguous

  int64_t parent_stride;  // of B, in elements; a row is contiguous
  int32_t batch, nodes, words;
};

constexpr int kMaxTreeNodes = 1024;

namespace cpu {
void tree_ancestors(const TreeAncestorsParams&);
}  // namespace cpu

namespace cuda {
void tree_ancestors(const TreeAncestorsParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
