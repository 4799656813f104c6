// tranche::tree_select: schema, checks, allocation.
#include "tree/tree_select.h"

#include "core/torch_glue.h"
#include "tree/tree_checks.h"

namespace tranche {
namespace {

void check_candidate_parents(const TensorChecks& check, const Tensor& parents) {
  const HostValues<int32_t> values(parents);
  const int64_t candidates = parents.size(1);
  for (int64_t b = 0; b < parents.size(0); ++b) {
    for (int64_t c = 0; c < candidates; ++c) {
      const int64_t got = values[b * candidates + c];
      check.index(got >= -1 && got < c, concat("parents[", b, ", ", c, "] in [-1, ", c, ")"), got,
                  "A candidate's parent is an earlier candidate, or -1 for the root.");
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tree_select(const Tensor& scores,
                                                                       const Tensor& parents,
                                                                       const Tensor& tokens,
                                                                       const Tensor& root_tokens,
                                                                       int64_t nodes) {
  const TensorChecks check("tree_select");
  check.dim("scores", scores, 2, "[B, C]");
#if defined(TRANCHE_BACKEND_CPU)
  check.dtype("scores", scores, {ScalarType::Float, ScalarType::Double});
#else
  check.dtype("scores", scores, {ScalarType::Float});
#endif
  check.contiguous("scores", scores);
  const int64_t batch = scores.size(0), candidates = scores.size(1);
  check.that(candidates <= kMaxCandidates, concat("scores.size(1) <= ", kMaxCandidates), candidates,
             "Drop the candidates that cannot be chosen.");
  check.exactly("parents", parents, ScalarType::Int, {batch, candidates}, "[B, C]", "scores", scores);
  check.exactly("tokens", tokens, ScalarType::Long, {batch, candidates}, "[B, C]", "scores", scores);
  check.exactly("root_tokens", root_tokens, ScalarType::Long, {batch}, "[B]", "scores", scores);
  check.that(nodes >= 1, "n_nodes >= 1", nodes, "The root is a node.");
  check_node_count(check, nodes);

  const int64_t words = (nodes + 63) / 64;
  Tensor parent = empty_on(scores, {batch, nodes}, ScalarType::Int);
  Tensor n_nodes = empty_on(scores, {batch}, ScalarType::Int);
  Tensor depth = empty_on(scores, {batch, nodes}, ScalarType::Int);
  Tensor ancestors = empty_on(scores, {batch, nodes, words}, ScalarType::Long);
  Tensor node_tokens = empty_on(scores, {batch, nodes}, ScalarType::Long);
  Tensor index = empty_on(scores, {batch, nodes}, ScalarType::Int);
  if (batch == 0) return {parent, n_nodes, depth, ancestors, node_tokens, index};
  if (checks_values()) check_candidate_parents(check, parents);

  TreeSelectParams p{};
  p.scores = scores.const_data_ptr();
  p.parents = data<int32_t>(parents);
  p.tokens = data<int64_t>(tokens);
  p.root_tokens = data<int64_t>(root_tokens);
  p.parent = mutable_data<int32_t>(parent);
  p.n_nodes = mutable_data<int32_t>(n_nodes);
  p.depth = mutable_data<int32_t>(depth);
  p.ancestors = mutable_data<int64_t>(ancestors);
  p.node_tokens = mutable_data<int64_t>(node_tokens);
  p.index = mutable_data<int32_t>(index);
  p.batch = int32_t(batch);
  p.candidates = int32_t(candidates);
  p.nodes = int32_t(nodes);
  p.words = int32_t(words);
  p.type = dtype_of_tensor(scores);
  RUN_KERNEL(tree_select, p, scores, parents, tokens, root_tokens, parent, n_nodes, depth, ancestors,
             node_tokens, index);
  return {parent, n_nodes, depth, ancestors, node_tokens, index};
}

REGISTER_OP(
    tree_select,
    "(Tensor scores, Tensor parents, Tensor tokens, Tensor root_tokens, SymInt n_nodes) -> (Tensor parent, "
    "Tensor n_nodes, Tensor depth, Tensor ancestors, Tensor node_tokens, Tensor index)")

}  // namespace
}  // namespace tranche
