// tranche::tree_expand_beam: schema, checks, allocation.
#include "tree/tree_expand_beam.h"

#include "core/torch_glue.h"

namespace tranche {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tree_expand_beam(const Tensor& logprobs,
                                                                    const Tensor& beam_scores, int64_t k) {
  const TensorChecks check("tree_expand_beam");
  check.dim("logprobs", logprobs, 3, "[B, K, V]");
#if defined(TRANCHE_BACKEND_CPU)
  check.dtype("logprobs", logprobs,
              {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
#else
  check.dtype("logprobs", logprobs, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
#endif
  check.last_contiguous("logprobs", logprobs);
  const int64_t batch = logprobs.size(0), beams = logprobs.size(1), vocab = logprobs.size(2);
  const bool is_double = logprobs.scalar_type() == ScalarType::Double;
  const ScalarType score_type = is_double ? ScalarType::Double : ScalarType::Float;
  check.exactly("beam_scores", beam_scores, score_type, {batch, beams}, "[B, K]", "logprobs", logprobs);
  check.that(beams >= 1 && beams <= kMaxBeam, concat("logprobs.size(1) in [1, ", kMaxBeam, "]"), beams,
             "A level grows from 1 to 128 beams.");
  check.that(vocab <= kMaxVocab, concat("logprobs.size(2) <= ", kMaxVocab), vocab,
             "Use a smaller vocabulary.");
  check.that(k >= 0 && k <= kMaxBeam, concat("k in [0, ", kMaxBeam, "]"), k, "Keep a narrower beam.");
  check.that(k <= vocab, concat("k <= logprobs.size(2) (", vocab, ")"), k,
             "A beam has no more children than there are tokens.");

  Tensor scores = empty_on(logprobs, {batch, k}, score_type);
  Tensor parent_beam = empty_on(logprobs, {batch, k}, ScalarType::Int);
  Tensor tokens = empty_on(logprobs, {batch, k}, ScalarType::Long);
  Tensor candidate_scores = empty_on(logprobs, {batch, beams, k}, score_type);
  Tensor candidate_tokens = empty_on(logprobs, {batch, beams, k}, ScalarType::Long);
  if (batch == 0 || k == 0) return {scores, parent_beam, tokens, candidate_scores, candidate_tokens};

  TreeExpandBeamParams p{};
  p.logprobs = logprobs.const_data_ptr();
  p.beam_scores = beam_scores.const_data_ptr();
  p.scores = scores.mutable_data_ptr();
  p.parent_beam = mutable_data<int32_t>(parent_beam);
  p.tokens = mutable_data<int64_t>(tokens);
  p.candidate_scores = candidate_scores.mutable_data_ptr();
  p.candidate_tokens = mutable_data<int64_t>(candidate_tokens);
  p.logprobs_stride[0] = logprobs.stride(0);
  p.logprobs_stride[1] = logprobs.stride(1);
  p.batch = int32_t(batch);
  p.beams = int32_t(beams);
  p.vocab = int32_t(vocab);
  p.k = int32_t(k);
  p.type = dtype_of_tensor(logprobs);
  const Tensor workspace =
      empty_on(logprobs, {int64_t(KERNEL(tree_expand_beam_workspace)(p))}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
#if defined(TRANCHE_BACKEND_CPU)
  const Tensor arrivals = empty_on(logprobs, {0}, ScalarType::Int);  // its threads are waited for
#else
  const Tensor arrivals = zeros_on(logprobs, {batch}, ScalarType::Int);
#endif
  p.arrivals = reinterpret_cast<uint32_t*>(mutable_data<int32_t>(arrivals));
  RUN_KERNEL(tree_expand_beam, p, logprobs, beam_scores, scores, parent_beam, tokens, candidate_scores,
             candidate_tokens, workspace, arrivals);
  return {scores, parent_beam, tokens, candidate_scores, candidate_tokens};
}

REGISTER_OP(
    tree_expand_beam,
    "(Tensor logprobs, Tensor beam_scores, SymInt k) -> (Tensor scores, Tensor parent_beam, Tensor tokens, "
    "Tensor candidate_scores, Tensor candidate_tokens)")

}  // namespace
}  // namespace tranche
