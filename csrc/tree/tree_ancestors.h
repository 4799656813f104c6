// Depth and ancestors of every node of a draft tree: what a kernel of this op receives.
#pragma once

#include <cstdint>

namespace tranche {

// B trees of at most N nodes, N <= 1024, W = ceil(N/64) words. n_nodes is clamped to [0, N]; the parent of a
// node i > 0 that is not in [0, i) is taken to be the root. Rows past n_nodes are written as zeros.
struct TreeAncestorsParams {
  const int32_t* parent;   // [B, N] the root is node 0; contiguous
  const int32_t* n_nodes;  // [B] nodes in use
  int64_t* ancestors;      // [B, N, W] bit j%64 of word j/64: node j is i or an ancestor of i; contiguous
  int32_t* depth;          // [B, N] root 0; contiguous
  int32_t batch, nodes, words;
};

namespace cpu {
void tree_ancestors(const TreeAncestorsParams&);
}

namespace cuda {
void tree_ancestors(const TreeAncestorsParams&, void* stream);
}

}  // namespace tranche
