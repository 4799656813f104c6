// tranche::tree_verify_typical: schema, checks, allocation.
#include "tree/tree_verify_typical.h"

#include "core/torch_glue.h"
#include "tree/tree_checks.h"
#include "tree/tree_sampling.h"

namespace tranche {
namespace {

std::tuple<Tensor, Tensor, Tensor> tree_verify_typical(const Tensor& tokens, const Tensor& parent,
                                                       const Tensor& n_nodes, const Tensor& logits,
                                                       double epsilon, double delta, double temperature) {
  const TensorChecks check("tree_verify_typical");
  check.dim("logits", logits, 3, "[B, N, V]");
  check.dtype("logits", logits, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  check.last_contiguous("logits", logits);
  const int64_t batch = logits.size(0), nodes = logits.size(1), vocab = logits.size(2);
  check.that(vocab >= 1 && vocab <= kMaxVocab, concat("logits.size(-1) in [1, ", kMaxVocab, "]"), vocab,
             "A row holds one logit per token of the vocabulary.");
  check_walk(check, tokens, parent, n_nodes, "logits", logits);
  check.that(std::isfinite(temperature) && temperature > 0, "a finite temperature > 0", temperature,
             "Use verify_greedy for temperature 0.");
  check.that(epsilon >= 0, "epsilon >= 0", epsilon, "It is the least probability that is always enough.");
  check.that(delta >= 0, "delta >= 0", delta, "It is what exp(-entropy) is multiplied with.");

  Tensor path = empty_on(logits, {batch, nodes}, ScalarType::Int);
  Tensor length = empty_on(logits, {batch}, ScalarType::Int);
  Tensor next_token = empty_on(logits, {batch}, ScalarType::Long);
  if (batch == 0) return {path, length, next_token};
  const Tensor edge = empty_on(logits, {batch, nodes}, ScalarType::Float);
  const Tensor largest = empty_on(logits, {batch, nodes}, ScalarType::Int);
  const Tensor arrived = zeros_on(logits, {batch}, ScalarType::Int);

  TreeVerifyTypicalParams params{};
  params.logits = logits.const_data_ptr();
  params.tokens = data<int64_t>(tokens);
  params.parent = data<int32_t>(parent);
  params.n_nodes = data<int32_t>(n_nodes);
  params.path = mutable_data<int32_t>(path);
  params.length = mutable_data<int32_t>(length);
  params.next_token = mutable_data<int64_t>(next_token);
  params.edge = mutable_data<float>(edge);
  params.largest = mutable_data<int32_t>(largest);
  params.arrived = mutable_data<uint32_t>(arrived);
  params.logits_stride[0] = logits.stride(0);
  params.logits_stride[1] = logits.stride(1);
  params.batch = int32_t(batch);
  params.nodes = int32_t(nodes);
  params.vocab = int32_t(vocab);
  params.epsilon = float(epsilon);
  params.delta = float(delta);
  params.factor = float(kLog2E / temperature);
  params.type = dtype_of_tensor(logits);
  RUN_KERNEL(tree_verify_typical, params, logits, tokens, parent, n_nodes, path, length, next_token, edge,
             largest, arrived);
  return {path, length, next_token};
}

REGISTER_OP(tree_verify_typical,
            "(Tensor tokens, Tensor parent, Tensor n_nodes, Tensor logits, float epsilon, float delta, "
            "float temperature=1.0) -> (Tensor path, Tensor length, Tensor next_token)")

}  // namespace
}  // namespace tranche
