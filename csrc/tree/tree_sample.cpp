// tranche::tree_sample and tranche::tree_verify_sample: schemas, checks, allocation.
//
// One kernel serves both: drawing a token from a row is the walk of a tree of one node.
#include "tree/tree_sample.h"

#include "core/torch_glue.h"
#include "tree/tree_checks.h"
#include "tree/tree_sampling.h"

namespace tranche {
namespace {

// The tensors that say how each sequence draws, [B] each.
struct SamplingTensors {
  const Tensor &temperature, &top_k, &top_p, &seed, &position;
};

void check_logits(const TensorChecks& check, const Tensor& logits) {
  check.dtype("logits", logits, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  check.last_contiguous("logits", logits);
  const int64_t vocab = logits.size(logits.dim() - 1);
  check.that(vocab >= 1 && vocab <= kMaxVocab, concat("logits.size(-1) in [1, ", kMaxVocab, "]"), vocab,
             "A row holds one logit per token of the vocabulary.");
}

void check_sampling(const TensorChecks& check, const SamplingTensors& s, int64_t batch,
                    const Tensor& logits) {
  check.exactly("temperature", s.temperature, ScalarType::Float, {batch}, "[B]", "logits", logits);
  check.exactly("top_k", s.top_k, ScalarType::Int, {batch}, "[B]", "logits", logits);
  check.exactly("top_p", s.top_p, ScalarType::Float, {batch}, "[B]", "logits", logits);
  check.exactly("seed", s.seed, ScalarType::Long, {batch}, "[B]", "logits", logits);
  check.exactly("position", s.position, ScalarType::Long, {batch}, "[B]", "logits", logits);
  if (!checks_values()) return;
  const HostValues<float> temperatures(s.temperature), shares(s.top_p);
  const HostValues<int32_t> counts(s.top_k);
  for (int64_t b = 0; b < batch; ++b) {
    if (!(std::isfinite(temperatures[b]) && temperatures[b] >= 0)) {
      check.index(false, concat("temperature[", b, "] finite and >= 0"), temperatures[b], "0 is greedy.");
    }
    check.in_range("top_k", b, counts[b], 0, INT32_MAX, "0 keeps all tokens.");
    if (!(shares[b] >= 0 && shares[b] <= 1)) {
      check.index(false, concat("top_p[", b, "] in [0, 1]"), shares[b], "1 keeps all tokens.");
    }
  }
}

TreeSampleParams sampling_params(const SamplingTensors& s, const Tensor& logits, const Tensor& next_token) {
  TreeSampleParams p{};
  p.logits = logits.const_data_ptr();
  p.temperature = data<float>(s.temperature);
  p.top_k = data<int32_t>(s.top_k);
  p.top_p = data<float>(s.top_p);
  p.seed = data<int64_t>(s.seed);
  p.position = data<int64_t>(s.position);
  p.next_token = mutable_data<int64_t>(next_token);
  p.logits_stride[0] = logits.stride(0);
  p.logits_stride[1] = logits.dim() == 3 ? logits.stride(1) : 0;
  p.batch = int32_t(logits.size(0));
  p.nodes = logits.dim() == 3 ? int32_t(logits.size(1)) : 1;
  p.vocab = int32_t(logits.size(logits.dim() - 1));
  p.type = dtype_of_tensor(logits);
  return p;
}

// `others` are the tensors that the kernel touches beside logits.
template <class... Tensors>
void run(TreeSampleParams& params, const Tensor& logits, [[maybe_unused]] const SamplingTensors& s,
         [[maybe_unused]] const Tensors&... others) {
  const TreeSampleSpace space = KERNEL(tree_sample_space)(params);
  const Tensor zeroed = zeros_on(logits, {space.zeroed}, ScalarType::Byte);
  const Tensor scratch = empty_on(logits, {space.scratch}, ScalarType::Byte);
  params.zeroed = zeroed.mutable_data_ptr();
  params.scratch = scratch.mutable_data_ptr();
  RUN_KERNEL(tree_sample, params, logits, s.temperature, s.top_k, s.top_p, s.seed, s.position, zeroed,
             scratch, others...);
}

Tensor tree_sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                   const Tensor& seed, const Tensor& position) {
  const TensorChecks check("tree_sample");
  const SamplingTensors sampling{temperature, top_k, top_p, seed, position};
  check.dim("logits", logits, 2, "[B, V]");
  check_logits(check, logits);
  check_sampling(check, sampling, logits.size(0), logits);

  Tensor next_token = empty_on(logits, {logits.size(0)}, ScalarType::Long);
  if (logits.size(0) == 0) return next_token;
  TreeSampleParams params = sampling_params(sampling, logits, next_token);
  run(params, logits, sampling, next_token);
  return next_token;
}

std::tuple<Tensor, Tensor, Tensor> tree_verify_sample(const Tensor& tokens, const Tensor& parent,
                                                      const Tensor& n_nodes, const Tensor& logits,
                                                      const Tensor& temperature, const Tensor& top_k,
                                                      const Tensor& top_p, const Tensor& seed,
                                                      const Tensor& position) {
  const TensorChecks check("tree_verify_sample");
  const SamplingTensors sampling{temperature, top_k, top_p, seed, position};
  check.dim("logits", logits, 3, "[B, N, V]");
  check_logits(check, logits);
  check_walk(check, tokens, parent, n_nodes, "logits", logits);
  check_sampling(check, sampling, logits.size(0), logits);

  const int64_t batch = logits.size(0), nodes = logits.size(1);
  Tensor path = empty_on(logits, {batch, nodes}, ScalarType::Int);
  Tensor length = empty_on(logits, {batch}, ScalarType::Int);
  Tensor next_token = empty_on(logits, {batch}, ScalarType::Long);
  if (batch == 0) return {path, length, next_token};
  TreeSampleParams params = sampling_params(sampling, logits, next_token);
  params.tokens = data<int64_t>(tokens);
  params.parent = data<int32_t>(parent);
  params.n_nodes = data<int32_t>(n_nodes);
  params.path = mutable_data<int32_t>(path);
  params.length = mutable_data<int32_t>(length);
  run(params, logits, sampling, tokens, parent, n_nodes, path, length, next_token);
  return {path, length, next_token};
}

REGISTER_OP(
    tree_sample,
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, Tensor position) -> Tensor")
REGISTER_OP(tree_verify_sample,
            "(Tensor tokens, Tensor parent, Tensor n_nodes, Tensor logits, Tensor temperature, Tensor top_k, "
            "Tensor top_p, Tensor seed, Tensor position) -> (Tensor path, Tensor length, Tensor next_token)")

}  // namespace
}  // namespace tranche
