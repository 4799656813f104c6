// Which mma variant serves a launch.
#pragma once

#include "tree/tree_attention_mma.cuh"
#include "tree/tree_attention_variants.h"

namespace tranche::cuda {

template <class T, int kDim, int kRowWarps, int kColumnWarps>
TreeAttentionVariant mma_variant() {
  using Traits = MmaTraits<T, kDim, kRowWarps, kColumnWarps>;
  TreeAttentionVariant variant{
      "tree_attention_mma",         tree_attention_mma<Traits>, nullptr, Traits::kThreads, Traits::kBlockRows,
      StreamMemory<Traits>::kBytes, StoredState<Traits>::kBytes};
  if constexpr (kRowWarps == 1) variant.paths = tree_attention_mma_paths<Traits>;
  return variant;
}

template <class T>
TreeAttentionVariant choose_mma(int head_dim, int64_t rows) {
  const bool few_rows =
      rows <= 16;  // decoding, or a narrow tree: one row tile, its columns shared among warps
  const bool many_rows = rows > 64;  // blocks of 128: half as much is read from L2 for each product
  if (head_dim <= 64) {
    return few_rows    ? mma_variant<T, 64, 1, 4>()
           : many_rows ? mma_variant<T, 64, 8, 1>()
                       : mma_variant<T, 64, 4, 1>();
  }
  if (head_dim <= 128) {
    return few_rows    ? mma_variant<T, 128, 1, 4>()
           : many_rows ? mma_variant<T, 128, 8, 1>()
                       : mma_variant<T, 128, 4, 1>();
  }
  // 256 columns of accumulators beside the queries would not fit a warp's registers: two warps share a row
  // tile.
  return few_rows ? mma_variant<T, 256, 1, 4>() : mma_variant<T, 256, 2, 2>();
}

}  // namespace tranche::cuda
