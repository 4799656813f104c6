// tranche::tree_verify_greedy: schema, checks, allocation.
#include "tree/tree_verify_greedy.h"

#include "core/torch_glue.h"
#include "tree/tree_checks.h"

namespace tranche {
namespace {

std::tuple<Tensor, Tensor, Tensor> tree_verify_greedy(const Tensor& tokens, const Tensor& parent,
                                                      const Tensor& n_nodes, const Tensor& target) {
  const TensorChecks check("tree_verify_greedy");
  check.dim("target", target, 2, "[B, N]");
  const int64_t batch = target.size(0), nodes = target.size(1);
  check.exactly("target", target, ScalarType::Long, {batch, nodes}, "[B, N]", "target", target);
  check_walk(check, tokens, parent, n_nodes, "target", target);

  Tensor path = empty_on(target, {batch, nodes}, ScalarType::Int);
  Tensor length = empty_on(target, {batch}, ScalarType::Int);
  Tensor next_token = empty_on(target, {batch}, ScalarType::Long);
  if (batch == 0) return {path, length, next_token};

  TreeVerifyGreedyParams params{};
  params.tokens = data<int64_t>(tokens);
  params.parent = data<int32_t>(parent);
  params.n_nodes = data<int32_t>(n_nodes);
  params.target = data<int64_t>(target);
  params.path = mutable_data<int32_t>(path);
  params.length = mutable_data<int32_t>(length);
  params.next_token = mutable_data<int64_t>(next_token);
  params.batch = int32_t(batch);
  params.nodes = int32_t(nodes);
  RUN_KERNEL(tree_verify_greedy, params, target, tokens, parent, n_nodes, path, length, next_token);
  return {path, length, next_token};
}

REGISTER_OP(tree_verify_greedy,
            "(Tensor tokens, Tensor parent, Tensor n_nodes, Tensor target) -> "
            "(Tensor path, Tensor length, Tensor next_token)")

}  // namespace
}  // namespace tranche
