// The arguments that tree_attention, its out= form and its backward have in common: checks, and how they
// reach a kernel.
#pragma once

#include "core/torch_glue.h"
#include "tree/tree_attention.h"
#include "tree/tree_checks.h"

namespace tranche {

inline constexpr int64_t kTreeHeadSizes[] = {32, 64, 80, 96, 128, 160, 192, 256};

// The tensors of one call by their public names.
struct TreeAttentionArguments {
  const Tensor &q, &k_cache, &v_cache, &cache_seqlens, &ancestors, &depth, &n_nodes;
  const std::optional<Tensor>&block_table, &sinks, &k_scale, &v_scale;

  int64_t batch() const { return q.size(0); }
  int64_t nodes() const { return q.size(1); }
  int64_t heads_q() const { return q.size(2); }
  int64_t head_dim() const { return q.size(3); }
  int64_t heads_kv() const { return k_cache.size(2); }
  int64_t pages() const { return k_cache.size(0); }
  int64_t page_size() const { return k_cache.size(1); }
  int64_t capacity() const { return block_table ? block_table->size(1) * page_size() : page_size(); }
};

inline void check_query(const TensorChecks& check, const TreeAttentionArguments& a) {
  check.dim("q", a.q, 4, "[B, N, Hq, D]");
#if defined(TRANCHE_BACKEND_CPU)
  check.dtype("q", a.q, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
#else
  check.dtype("q", a.q, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
#endif
  check.last_contiguous("q", a.q);
  bool supported = false;
  for (int64_t size : kTreeHeadSizes) supported = supported || a.head_dim() == size;
  check.that(supported, "q.size(-1) in {32, 64, 80, 96, 128, 160, 192, 256}", a.head_dim(),
             "Pad the heads of q and of both caches with zeros to the next of these sizes.");
  check_node_count(check, a.nodes());
}

inline void check_caches(const TensorChecks& check, const TreeAttentionArguments& a) {
  const char* shape = a.block_table ? "[pages, page_size, Hkv, D]" : "[B, S, Hkv, D]";
  check.dim("k_cache", a.k_cache, 4, shape);
  check.dim("v_cache", a.v_cache, 4, shape);
  check.same_device("k_cache", a.k_cache, "q", a.q);
  check.same_device("v_cache", a.v_cache, "q", a.q);
  check.dtype("k_cache", a.k_cache, {a.q.scalar_type(), ScalarType::Float8_e4m3fn});
  check.dtype("v_cache", a.v_cache, {a.k_cache.scalar_type()});
  check.last_contiguous("k_cache", a.k_cache);
  check.last_contiguous("v_cache", a.v_cache);
  check.equal("k_cache.size(-1)", a.k_cache.size(3), "q.size(-1)", a.head_dim(),
              "Queries and keys are compared element by element.");
  check.same_sizes("v_cache", a.v_cache, "k_cache", a.k_cache, 4, "Both caches have one shape.");
  check.that(a.heads_kv() > 0 && a.heads_q() % a.heads_kv() == 0,
             concat("q.size(2) a multiple of k_cache.size(2) (", a.heads_kv(), ")"), a.heads_q(),
             "Each key/value head serves a whole number of query heads. Caches are [B, S, Hkv, D], or "
             "[pages, page_size, Hkv, D]: transpose(1, 2) those of transformers.");
  if (a.block_table) {
    const Tensor& table = *a.block_table;
    check.dim("block_table", table, 2, "[B, max_pages]");
    check.dtype("block_table", table, {ScalarType::Int});
    check.same_device("block_table", table, "q", a.q);
    check.last_contiguous("block_table", table);
    check.equal("block_table.size(0)", table.size(0), "q.size(0)", a.batch(),
                "Give each sequence its row of pages.");
    check.that(a.page_size() > 0, "k_cache.size(1) > 0 (slots per page)", "0", "Allocate pages with slots.");
  } else {
    check.equal("k_cache.size(0)", a.k_cache.size(0), "q.size(0)", a.batch(),
                "A cache without block_table holds one row per sequence.");
  }
  check.that(a.capacity() <= INT32_MAX, "at most 2^31 - 1 slots in a sequence", a.capacity(),
             "Use a smaller cache or block_table.");
}

inline void check_indices_and_scales(const TensorChecks& check, const TreeAttentionArguments& a) {
  const int64_t batch = a.batch(), nodes = a.nodes(), words = (nodes + 63) / 64;
  check.exactly("cache_seqlens", a.cache_seqlens, ScalarType::Int, {batch}, "[B]", "q", a.q);
  check.exactly("ancestors", a.ancestors, ScalarType::Long, {batch, nodes, words}, "[B, N, ceil(N/64)]", "q",
                a.q);
  check.exactly("depth", a.depth, ScalarType::Int, {batch, nodes}, "[B, N]", "q", a.q);
  check.exactly("n_nodes", a.n_nodes, ScalarType::Int, {batch}, "[B]", "q", a.q);
  if (a.sinks) {
    check.exactly("sinks", *a.sinks, ScalarType::Float, {a.heads_q()}, "[Hq]", "q", a.q);
  }
  const bool fp8 = a.k_cache.scalar_type() == ScalarType::Float8_e4m3fn;
  const std::pair<const char*, const std::optional<Tensor>&> scales[] = {{"k_scale", a.k_scale},
                                                                         {"v_scale", a.v_scale}};
  for (const auto& [name, scale] : scales) {
    if (!scale) continue;
    check.that(fp8, concat("no ", name, " for caches of dtype ", dtype_text(a.k_cache.scalar_type())), "one",
               "Scales belong to float8_e4m3fn caches.");
    check.exactly(name, *scale, ScalarType::Float, {a.heads_kv()}, "[Hkv]", "k_cache", a.k_cache);
  }
}

// Lengths and pages: the values that only the device sees.
inline void check_lengths(const TensorChecks& check, const TreeAttentionArguments& a) {
  const HostValues<int32_t> lengths(a.cache_seqlens), counts(a.n_nodes);
  check_n_nodes(check, counts, a.batch(), a.nodes());
  for (int64_t b = 0; b < a.batch(); ++b) {
    check.in_range("cache_seqlens", b, lengths[b], 0, a.capacity(),
                   "It counts the committed tokens in the cache.");
    const int64_t used = int64_t(lengths[b]) + counts[b];
    check.index(used <= a.capacity(), concat("cache_seqlens[", b, "] + n_nodes[", b, "] <= ", a.capacity()),
                used,
                a.block_table ? "Give block_table more pages: the tree's nodes need slots too."
                              : "Allocate a longer cache: the tree's nodes need slots too.");
  }
  if (!a.block_table) return;
  const HostValues<int32_t> pages(*a.block_table);
  const int64_t columns = a.block_table->size(1);
  for (int64_t b = 0; b < a.batch(); ++b) {
    const int64_t used = (int64_t(lengths[b]) + counts[b] + a.page_size() - 1) / a.page_size();
    for (int64_t i = 0; i < used; ++i) {
      const int64_t page = pages[b * columns + i];
      check.index(page >= 0 && page < a.pages(),
                  concat("block_table[", b, ", ", i, "] in [0, ", a.pages(), ")"), page,
                  "Every page that holds a used slot must exist in the cache.");
    }
  }
}

inline void set_strides(int64_t (&strides)[3], const Tensor& tensor) {
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

inline TreeAttentionParams make_params(const TreeAttentionArguments& a, const Tensor& out,
                                       const Tensor& lse) {
  TreeAttentionParams p{};
  p.q = a.q.const_data_ptr();
  p.k_cache = a.k_cache.const_data_ptr();
  p.v_cache = a.v_cache.const_data_ptr();
  p.cache_seqlens = data<int32_t>(a.cache_seqlens);
  p.ancestors = data<int64_t>(a.ancestors);
  p.depth = data<int32_t>(a.depth);
  p.n_nodes = data<int32_t>(a.n_nodes);
  p.block_table = data<int32_t>(a.block_table);
  p.sinks = data<float>(a.sinks);
  p.k_scale = data<float>(a.k_scale);
  p.v_scale = data<float>(a.v_scale);
  p.out = out.mutable_data_ptr();
  p.lse = lse.numel() > 0 ? mutable_data<float>(lse) : nullptr;
  set_strides(p.q_stride, a.q);
  set_strides(p.k_stride, a.k_cache);
  set_strides(p.v_stride, a.v_cache);
  set_strides(p.out_stride, out);
  p.block_table_stride = a.block_table ? a.block_table->stride(0) : 0;
  p.batch = int32_t(a.batch());
  p.nodes = int32_t(a.nodes());
  p.heads_q = int32_t(a.heads_q());
  p.heads_kv = int32_t(a.heads_kv());
  p.head_dim = int32_t(a.head_dim());
  p.words = int32_t(a.ancestors.size(2));
  p.capacity = int32_t(a.capacity());
  p.page_size = int32_t(a.page_size());
  p.num_pages = int32_t(a.pages());
  p.q_type = dtype_of_tensor(a.q);
  p.kv_type = dtype_of_tensor(a.k_cache);
  return p;
}

inline void set_scalars(const TensorChecks& check, TreeAttentionParams& p, std::optional<double> scale,
                        std::optional<int64_t> window, std::optional<double> softcap, bool exact) {
  check.that(!scale || std::isfinite(*scale), "a finite scale", scale ? *scale : 0.0,
             "Leave it out for D^-0.5.");
  check.that(!window || *window > 0, "window > 0", window ? *window : 0, "Leave it out for no window.");
  check.that(!softcap || (std::isfinite(*softcap) && *softcap > 0), "a finite softcap > 0",
             softcap ? *softcap : 0.0, "Leave it out for no cap.");
  p.scale_f64 = scale.value_or(1.0 / std::sqrt(double(p.head_dim)));
  p.scale = float(p.scale_f64);
  p.window = window.value_or(0);
  p.softcap = float(softcap.value_or(0.0));
  p.exact = exact;
}

// Everything that the host can see of the tensors.
inline void check_tensors(const TensorChecks& check, const TreeAttentionArguments& a) {
  check_query(check, a);
  check_caches(check, a);
  check_indices_and_scales(check, a);
}

}  // namespace tranche
