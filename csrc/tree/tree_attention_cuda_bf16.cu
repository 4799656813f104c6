#include "tree/tree_attention_mma_variants.cuh"

namespace tranche::cuda {

template <>
TreeAttentionVariant tree_attention_variant<bf16>(int head_dim, int64_t rows) {
  return choose_mma<bf16>(head_dim, rows);
}

}  // namespace tranche::cuda
