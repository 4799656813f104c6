// One block per tree: see tree_ancestors_block.cuh.
#pragma once

#include "tree/tree_ancestors_block.cuh"

namespace tranche {

__global__ void __launch_bounds__(TreeAncestorsTraits::kMaxNodes)
    tree_ancestors_kernel(TreeAncestorsParams p) {
  SHARED(TreeAncestorsShared, shared, 1);
  const int b = int(blockIdx.x), node = int(threadIdx.x);
  const int count = p.n_nodes[b] < 0 ? 0 : (p.n_nodes[b] > p.nodes ? p.nodes : p.n_nodes[b]);
  int parent = -1;
  if (node < count && node > 0) {
    parent = p.parent[b * p.parent_stride + node];
    if (parent < 0 || parent >= node) parent = 0;
  }
  write_ancestors(shared[0], parent, count, p.nodes, p.words, p.ancestors + int64_t(b) * p.nodes * p.words,
                  p.depth + int64_t(b) * p.nodes);
}

}  // namespace tranche
