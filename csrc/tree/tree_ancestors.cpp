// tranche::tree_ancestors: schema, checks, allocation.
#include "tree/tree_ancestors.h"

#include "core/torch_glue.h"
#include "tree/tree_checks.h"

namespace tranche {
namespace {

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
