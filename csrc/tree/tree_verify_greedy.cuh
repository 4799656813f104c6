// One block per tree. Each node that is its parent's first child with the target's token is the parent's
// successor; one thread then follows the successors from the root.
#pragma once

#include "core/launch.cuh"
#include "tree/tree_verify_greedy.h"
#include "tree/tree_walk.h"

namespace tranche {

struct TreeVerifyGreedyTraits {
  static constexpr int kThreads = 128;
  static constexpr int kMaxNodes = kMaxTreeNodes;
};

__global__ void __launch_bounds__(TreeVerifyGreedyTraits::kThreads)
    tree_verify_greedy_kernel(TreeVerifyGreedyParams p) {
  constexpr int kThreads = TreeVerifyGreedyTraits::kThreads, kMaxNodes = TreeVerifyGreedyTraits::kMaxNodes;
  SHARED(int32_t, successor, kMaxNodes);  // kMaxNodes where the path ends
  SHARED(int32_t, steps, 1);

  const int b = int(blockIdx.x), thread = int(threadIdx.x);
  const int64_t row = int64_t(b) * p.nodes;
  const int64_t *tokens = p.tokens + row, *target = p.target + row;
  const int32_t* parents = p.parent + row;
  const int32_t count = clamped_count(p.n_nodes[b], p.nodes);
  int32_t* path = p.path + row;

  for (int i = thread; i < count; i += kThreads) successor[i] = kMaxNodes;
  __syncthreads();
  for (int i = thread + 1; i < count; i += kThreads) {
    const int32_t parent = parent_of(parents, i);
    if (tokens[i] == target[parent]) atomicMin(&successor[parent], i);
  }
  __syncthreads();
  if (thread == 0) {
    int32_t on_path = 0, last = 0;
    for (int32_t node = 0; node < count; node = successor[node]) {
      path[on_path++] = node;
      last = node;
    }
    p.length[b] = on_path > 0 ? on_path - 1 : 0;
    p.next_token[b] = on_path > 0 ? target[last] : -1;
    steps[0] = on_path;
  }
  __syncthreads();
  for (int i = steps[0] + thread; i < p.nodes; i += kThreads) path[i] = -1;
}

}  // namespace tranche
