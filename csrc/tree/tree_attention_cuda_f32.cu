#include "tree/tree_attention_ffma.cuh"
#include "tree/tree_attention_variants.h"

namespace tranche::cuda {
namespace {

template <int kDim, int kThreadRows>
TreeAttentionVariant ffma_variant() {
  using Traits = FfmaTraits<kDim, kThreadRows>;
  TreeAttentionVariant variant{
      "tree_attention_ffma",      tree_attention_ffma<Traits>, nullptr,
      Traits::kThreads,           Traits::kBlockRows,          StreamMemory<Traits>::kBytes,
      StoredState<Traits>::kBytes};
  if constexpr (kThreadRows == 2) variant.paths = tree_attention_ffma_paths<Traits>;
  return variant;
}

}  // namespace

template <>
TreeAttentionVariant tree_attention_variant<float>(int head_dim, int64_t rows) {
  const bool few_rows = rows <= 16;
  if (head_dim <= 64) return few_rows ? ffma_variant<64, 2>() : ffma_variant<64, 4>();
  if (head_dim <= 128) return few_rows ? ffma_variant<128, 2>() : ffma_variant<128, 4>();
  return ffma_variant<256, 2>();  // 32 rows of 256 would not fit shared memory beside the ring
}

}  // namespace tranche::cuda
