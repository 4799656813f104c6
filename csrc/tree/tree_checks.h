// What every op of the family asks of a tree's tensors.
#pragma once

#include "core/torch_glue.h"
#include "tree/tree_ancestors.h"

namespace tranche {

inline void check_node_count(const TensorChecks& check, int64_t nodes) {
  check.that(nodes <= kMaxTreeNodes, concat("at most ", kMaxTreeNodes, " nodes in a tree"), nodes,
             "Prune the tree, or feed a long prompt as chained chunks (Tree.chain).");
}

// n_nodes[b] in [0, nodes], where the backend reads values.
inline void check_n_nodes(const TensorChecks& check, const HostValues<int32_t>& n_nodes, int64_t batch,
                          int64_t nodes) {
  for (int64_t b = 0; b < batch; ++b) {
    check.in_range("n_nodes", b, n_nodes[b], 0, nodes, "A tree cannot use more nodes than its row holds.");
  }
}

// Every node in use hangs under an earlier one, and node 0 is the root, where the backend reads values.
inline void check_parents(const TensorChecks& check, const Tensor& parent, const Tensor& n_nodes) {
  const HostValues<int32_t> parents(parent), counts(n_nodes);
  const int64_t batch = parent.size(0), nodes = parent.size(1);
  check_n_nodes(check, counts, batch, nodes);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < counts[b]; ++i) {
      const int64_t got = parents[b * nodes + i];
      check.index(i > 0 || got == -1, concat("parent[", b, ", 0] == -1 (the root)"), got,
                  "Number the nodes so that the root comes first.");
      check.index(i == 0 || (got >= 0 && got < i), concat("parent[", b, ", ", i, "] in [0, ", i, ")"), got,
                  "Number the nodes so that every parent comes before its children.");
    }
  }
}

// The tensors of a walk down the tree: tokens, parent [B, N] and n_nodes [B], for B and N of `other`.
inline void check_walk(const TensorChecks& check, const Tensor& tokens, const Tensor& parent,
                       const Tensor& n_nodes, Phrase other_name, const Tensor& other) {
  const int64_t batch = other.size(0), nodes = other.size(1);
  check_node_count(check, nodes);
  check.exactly("tokens", tokens, ScalarType::Long, {batch, nodes}, "[B, N]", other_name, other);
  check.exactly("parent", parent, ScalarType::Int, {batch, nodes}, "[B, N]", other_name, other);
  check.exactly("n_nodes", n_nodes, ScalarType::Int, {batch}, "[B]", other_name, other);
  if (checks_values()) check_parents(check, parent, n_nodes);
}

}  // namespace tranche
