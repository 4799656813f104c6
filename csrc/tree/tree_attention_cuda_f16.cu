#include "tree/tree_attention_mma_variants.cuh"

namespace tranche::cuda {

TreeAttentionVariant tree_attention_f16(int head_dim, int64_t rows) {
  return choose_mma<half>(head_dim, rows);
}

}  // namespace tranche::cuda
