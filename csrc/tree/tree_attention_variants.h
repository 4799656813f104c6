// The instantiations of tree_attention's kernels, as its planner sees them. Each type is compiled in a file
// of its own: they take nvcc about as long.
#pragma once

#include "tree/tree_attention.cuh"

namespace tranche::cuda {

struct TreeAttentionVariant {
  const char* name;
  void (*kernel)(TreeAttentionLaunch);
  void (*paths)(
      TreeAttentionLaunch);  // exact's second pass; null unless this variant is the one for few rows
  int threads;
  int rows;          // packed rows of a block
  int smem;          // bytes
  int stored_bytes;  // of a stored state
};

// The variant for a head size and this many packed rows. All that a head size has share the MMA instruction,
// tile, chunk and order of sums. One for one row always walks paths.
template <class T>
TreeAttentionVariant tree_attention_variant(int head_dim, int64_t rows);
template <>
TreeAttentionVariant tree_attention_variant<float>(int head_dim, int64_t rows);
template <>
TreeAttentionVariant tree_attention_variant<half>(int head_dim, int64_t rows);
template <>
TreeAttentionVariant tree_attention_variant<bf16>(int head_dim, int64_t rows);

}  // namespace tranche::cuda
