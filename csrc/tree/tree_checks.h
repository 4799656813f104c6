// What every op of the family asks of a tree's tensors.
#pragma once

#include "core/torch_glue.h"
#include "tree/tree_ancestors.h"

namespace tranche {

inline void check_node_count(const TensorChecks& check, int64_t nodes) {
  check.that(nodes <= kMaxTreeNodes, concat("at most ", kMaxTreeNodes, " nodes in a tree"), concat(nodes),
             "Prune the tree, or feed a long prompt as chained chunks (Tree.chain).");
}

// n_nodes[b] in [0, nodes], where the backend reads values.
inline void check_n_nodes(const TensorChecks& check, const HostValues<int32_t>& n_nodes, int64_t batch,
                          int64_t nodes) {
  for (int64_t b = 0; b < batch; ++b) {
    check.in_range("n_nodes", b, n_nodes[b], 0, nodes, "A tree cannot use more nodes than its row holds.");
  }
}

}  // namespace tranche
