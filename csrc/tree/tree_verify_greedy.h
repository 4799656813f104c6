// The longest path of a tree that follows the target's own choices: what a kernel of this op receives.
#pragma once

#include <cstdint>

#include "tree/tree_ancestors.h"

namespace tranche {

// Sizes: B trees, N <= 1024 nodes per tree at most.
//
// From the root on, the walk goes to the first child whose token is the target's at the node, and ends where
// there is none. Clamps and empty trees as in TreeSampleParams.
struct TreeVerifyGreedyParams {
  const int64_t* tokens;   // [B, N] of the draft
  const int32_t* parent;   // [B, N]
  const int32_t* n_nodes;  // [B]
  const int64_t* target;   // [B, N] the target's token after each node
  int32_t* path;           // [B, N] out
  int32_t* length;         // [B] out
  int64_t* next_token;     // [B] out

  int32_t batch, nodes;  // all are contiguous
};

namespace cpu {
void tree_verify_greedy(const TreeVerifyGreedyParams&);
}  // namespace cpu

namespace cuda {
void tree_verify_greedy(const TreeVerifyGreedyParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
