// One level of growth of a draft tree: what a kernel of this op receives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/numeric.h"

namespace tranche {

constexpr int kMaxBeam = 128;           // K and k
constexpr int64_t kMaxVocab = 1 << 20;  // V

// Sizes: B sequences, K beams each, V tokens, k kept. A candidate's score is logprob + beam score, added in
// float (double for f64); NaN counts as -inf. Candidates of a beam are ordered by (score, lower token), and
// the new beam is chosen from all of them by (score, lower position in [K * k]).
struct TreeExpandBeamParams {
  const void* logprobs;       // [B, K, V], type; rows contiguous
  const void* beam_scores;    // [B, K] float (double for f64), contiguous
  void* scores;               // [B, k] as beam_scores
  int32_t* parent_beam;       // [B, k]
  int64_t* tokens;            // [B, k]
  void* candidate_scores;     // [B, K, k] as beam_scores
  int64_t* candidate_tokens;  // [B, K, k]
  void* workspace;     // tree_expand_beam_workspace(params) bytes, 256-byte aligned; or null if that is 0
  uint32_t* arrivals;  // [B] zeros; or null on the CPU

  int64_t logprobs_stride[2];  // of B, K
  int32_t batch, beams, vocab, k;
  DType type;
};

namespace cpu {
size_t tree_expand_beam_workspace(const TreeExpandBeamParams&);
void tree_expand_beam(const TreeExpandBeamParams&);
}  // namespace cpu

namespace cuda {
size_t tree_expand_beam_workspace(const TreeExpandBeamParams&);
void tree_expand_beam(const TreeExpandBeamParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
