// tranche::tree_ancestors: schema, checks, allocation.
#include "tree/tree_ancestors.h"

#include "core/torch_glue.h"
#include "tree/tree_checks.h"

namespace tranche {
namespace {

void check_parents(const TensorChecks& check, const Tensor& parent, const Tensor& n_nodes) {
  const HostValues<int32_t> parents(parent), counts(n_nodes);
  const int64_t batch = parent.size(0), nodes = parent.size(1);
  check_n_nodes(check, counts, batch, nodes);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < counts[b]; ++i) {
      const int64_t got = parents[b * nodes + i];
      if (i == 0 ? got == -1 : got >= 0 && got < i) continue;
      check.index(false,
                  concat("parent[", b, ", ", i, "] ",
                         i == 0 ? std::string("== -1 (the root)") : concat("in [0, ", i, ")")),
                  concat(got), "Number the nodes so that every parent comes before its children.");
    }
  }
}

std::tuple<Tensor, Tensor> tree_ancestors(const Tensor& parent, const Tensor& n_nodes) {
  const TensorChecks check("tree_ancestors");
  check.dim("parent", parent, 2, "[B, N]");
  check.dtype("parent", parent, {ScalarType::Int});
  check.last_contiguous("parent", parent);
  const int64_t batch = parent.size(0), nodes = parent.size(1), words = (nodes + 63) / 64;
  check_node_count(check, nodes);
  check.exactly("n_nodes", n_nodes, ScalarType::Int, {batch}, "[B]", "parent", parent);

  Tensor ancestors = empty_on(parent, {batch, nodes, words}, ScalarType::Long);
  Tensor depth = empty_on(parent, {batch, nodes}, ScalarType::Int);
  if (batch == 0 || nodes == 0) return {ancestors, depth};
  if (checks_values()) check_parents(check, parent, n_nodes);

  TreeAncestorsParams params{};
  params.parent = data<int32_t>(parent);
  params.n_nodes = data<int32_t>(n_nodes);
  params.ancestors = mutable_data<int64_t>(ancestors);
  params.depth = mutable_data<int32_t>(depth);
  params.parent_stride = parent.stride(0);
  params.batch = int32_t(batch);
  params.nodes = int32_t(nodes);
  params.words = int32_t(words);
  RUN_KERNEL(tree_ancestors, params, parent, n_nodes, ancestors, depth);
  return {ancestors, depth};
}

REGISTER_OP(tree_ancestors, "(Tensor parent, Tensor n_nodes) -> (Tensor ancestors, Tensor depth)")

}  // namespace
}  // namespace tranche
