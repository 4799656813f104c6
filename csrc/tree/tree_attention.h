// Attention of the nodes of a draft tree over a long KV cache: what a kernel of this op receives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/numeric.h"

namespace tranche {

// Sizes: B sequences, N nodes per tree at most, Hq query heads, Hkv key/value heads, D head size,
// W = ceil(N/64) words, S slots. Strides are in elements; the last dimension of q, caches and out is
// contiguous. Everything below is validated on the host but for what only the device sees: n_nodes is
// clamped to [0, N], cache_seqlens to [0, capacity - n_nodes], block table entries to [0, num_pages).
struct TreeAttentionParams {
  const void* q;        // [B, N, Hq, D], q_type
  const void* k_cache;  // [B, S, Hkv, D], or [num_pages, page_size, Hkv, D] with a block table; kv_type
  const void* v_cache;  // likewise
  const int32_t* cache_seqlens;  // [B] committed tokens; node i is in slot cache_seqlens[b] + i
  const int64_t* ancestors;      // [B, N, W] bit j: node j is i or an ancestor of i; contiguous
  const int32_t* depth;          // [B, N] root 0; contiguous
  const int32_t* n_nodes;        // [B] nodes in use
  const int32_t* block_table;    // [B, max_pages], or null: then sequence b owns row b of the cache
  const float* sinks;            // [Hq], or null
  const float* k_scale;          // [Hkv], or null: what a stored key is multiplied with
  const float* v_scale;          // [Hkv], or null
  void* out;                     // [B, N, Hq, D], q_type
  float* lse;                    // [B, N, Hq] natural logarithm, contiguous; or null
  void* workspace;               // workspace_bytes(params), 256-byte aligned; or null if that is 0

  int64_t q_stride[3];  // of B, N, Hq
  int64_t k_stride[3];  // of B or page, slot, Hkv
  int64_t v_stride[3];
  int64_t out_stride[3];       // of B, N, Hq
  int64_t block_table_stride;  // of B

  int32_t batch, nodes, heads_q, heads_kv, head_dim, words;
  int32_t capacity;   // slots a sequence can hold: S, or max_pages * page_size
  int32_t page_size;  // slots per page; capacity when there is no block table
  int32_t num_pages;  // pages in the cache; B when there is no block table

  DType q_type, kv_type;  // equal, or kv_type is e4m3
  float scale;            // scores are scale * <q, k>
  float softcap;          // 0, or: scores become softcap * tanh(scores / softcap)
  int64_t window;         // 0, or: a key is visible iff its position > the row's position - window
  bool exact;             // lay the arithmetic out by key position instead of by slot
  double scale_f64;       // scale before it was rounded to float: what fp64 uses
};

namespace cpu {
size_t tree_attention_workspace(const TreeAttentionParams&);
void tree_attention(const TreeAttentionParams&);
}  // namespace cpu

namespace cuda {
size_t tree_attention_workspace(const TreeAttentionParams&);
void tree_attention(const TreeAttentionParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
