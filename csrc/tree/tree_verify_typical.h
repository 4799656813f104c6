// Typical acceptance: what a kernel of this op receives.
#pragma once

#include <cstdint>

#include "core/numeric.h"
#include "tree/tree_ancestors.h"

namespace tranche {

// Sizes: B sequences, N <= 1024 nodes per tree, V <= 2^24 tokens in the vocabulary.
//
// With p = softmax(logits / temperature) of a node and H its entropy in nats, the edge to a child is taken
// when p(its token) > min(epsilon, delta * exp(-H)). A node is accepted when all edges from the root to it
// are taken. Clamps and empty trees as in TreeSampleParams.
struct TreeVerifyTypicalParams {
  const void* logits;      // [B, N, V]
  const int64_t* tokens;   // [B, N]
  const int32_t* parent;   // [B, N]
  const int32_t* n_nodes;  // [B]
  int32_t* path;           // [B, N] out
  int32_t* length;         // [B] out
  int64_t* next_token;     // [B] out
  float* edge;             // [B, N] scratch: log2 p of the edge to the node, NaN where it is not taken
  int32_t* largest;        // [B, N] scratch: the token of the node's largest logit
  uint32_t* arrived;       // [B] zeros; CUDA only

  int64_t logits_stride[2];  // of B and N, in elements; a row is contiguous, and so are all other tensors
  int32_t batch, nodes, vocab;
  float epsilon, delta, factor;  // factor: log2(e) / temperature
  DType type;                    // f32, f16 or bf16
};

// What a node's row says: the largest logit, log2 of the sum of 2^y over all tokens with y as in
// tree_sampling.h, and the least probability at which a child is accepted.
struct TypicalRow {
  float max, log_sum, threshold;
};

namespace cpu {
void tree_verify_typical(const TreeVerifyTypicalParams&);
}  // namespace cpu

namespace cuda {
void tree_verify_typical(const TreeVerifyTypicalParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
