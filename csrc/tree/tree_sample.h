// Drawing tokens from rows of logits, and walking a draft tree by such draws: what the kernel of tree_sample
// and tree_verify_sample receives.
#pragma once

#include <cstdint>

#include "core/numeric.h"
#include "tree/tree_ancestors.h"

namespace tranche {

// Sizes: B sequences, N <= 1024 nodes per tree, V <= 2^24 tokens in the vocabulary. tree_sample is the walk
// of trees of one node: N = 1, and null for whatever belongs to trees.
//
// The walk of sequence b begins at node 0. At a node of depth d a token is drawn from the node's row with the
// random bits of (seed[b], position[b] + d); the first child with that token is the next node, and where
// there is none the walk ends and next_token is the token. Rows that the walk does not visit are not read.
// n_nodes is clamped to [0, N]; with 0 the sequence gets path -1, length 0 and next_token -1. A parent entry
// that is no parent (see TreeAncestorsParams) counts as 0. A temperature that is not above 0 is greedy; top_k
// <= 0 and top_p >= 1 or NaN keep all tokens; top_p <= 0 keeps one.
struct TreeSampleParams {
  const void* logits;        // [B, N, V]
  const int64_t* tokens;     // [B, N] or null
  const int32_t* parent;     // [B, N] or null
  const int32_t* n_nodes;    // [B] or null
  const float* temperature;  // [B]
  const int32_t* top_k;      // [B]
  const float* top_p;        // [B]
  const int64_t* seed;       // [B]
  const int64_t* position;   // [B] of the token after the root
  int32_t* path;             // [B, N] out, or null
  int32_t* length;           // [B] out, or null
  int64_t* next_token;       // [B] out
  void* zeroed;              // TreeSampleSpace::zeroed bytes of zeros
  void* scratch;             // TreeSampleSpace::scratch bytes

  int64_t logits_stride[2];  // of B and N, in elements; a row is contiguous, and so are all other tensors
  int32_t batch, nodes, vocab;
  DType type;  // f32, f16 or bf16
};

// Bytes of memory that a kernel needs beside its results.
struct TreeSampleSpace {
  int64_t zeroed, scratch;
};

namespace cpu {
TreeSampleSpace tree_sample_space(const TreeSampleParams&);
void tree_sample(const TreeSampleParams&);
}  // namespace cpu

namespace cuda {
TreeSampleSpace tree_sample_space(const TreeSampleParams&);
void tree_sample(const TreeSampleParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
