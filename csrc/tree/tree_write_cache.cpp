// tranche::tree_write_cache_: schema, checks.
#include "tree/tree_write_cache.h"

#include "tree/tree_cache_checks.h"
#include "tree/tree_checks.h"

namespace tranche {
namespace {

struct WriteArguments {
  const Tensor &k, &v, &k_cache, &v_cache, &cache_seqlens, &depth, &n_nodes;
  const std::optional<Tensor>&block_table, &cos, &sin, &k_scale, &v_scale;
};

void check_states(const TensorChecks& check, const WriteArguments& a) {
  check.dim("k", a.k, 4, "[B, N, Hkv, D]");
#if defined(TRANCHE_BACKEND_CPU)
  check.dtype("k", a.k, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
#else
  check.dtype("k", a.k, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
#endif
  check.dim("v", a.v, 4, "[B, N, Hkv, D]");
  check.dtype("v", a.v, {a.k.scalar_type()});
  check.same_device("v", a.v, "k", a.k);
  check.last_contiguous("k", a.k);
  check.last_contiguous("v", a.v);
  const char* v_sizes[] = {"v.size(0)", "v.size(1)", "v.size(2)", "v.size(3)"};
  const char* k_sizes[] = {"k.size(0)", "k.size(1)", "k.size(2)", "k.size(3)"};
  for (int i = 0; i < 4; ++i) {
    check.equal(v_sizes[i], a.v.size(i), k_sizes[i], a.k.size(i), "Keys and values come in pairs.");
  }
  check_node_count(check, a.k.size(1));
}

void check_caches(const TensorChecks& check, const WriteArguments& a) {
  check_cache_layout(check, "k_cache", a.k_cache, a.block_table, a.k.size(0), "k.size(0)", a.k, "k");
  check_cache_layout(check, "v_cache", a.v_cache, a.block_table, a.k.size(0), "k.size(0)", a.k, "k");
  check.dtype("k_cache", a.k_cache, {a.k.scalar_type(), ScalarType::Float8_e4m3fn});
  check.dtype("v_cache", a.v_cache, {a.k_cache.scalar_type()});
  const char* v_sizes[] = {"v_cache.size(0)", "v_cache.size(1)", "v_cache.size(2)", "v_cache.size(3)"};
  const char* k_sizes[] = {"k_cache.size(0)", "k_cache.size(1)", "k_cache.size(2)", "k_cache.size(3)"};
  for (int i = 0; i < 4; ++i) {
    check.equal(v_sizes[i], a.v_cache.size(i), k_sizes[i], a.k_cache.size(i), "Both caches have one shape.");
  }
  check.equal("k_cache.size(2)", a.k_cache.size(2), "k.size(2)", a.k.size(2),
              "A cache holds every key/value head.");
  check.equal("k_cache.size(3)", a.k_cache.size(3), "k.size(3)", a.k.size(3), "A cache holds whole heads.");
  const bool fp8 = a.k_cache.scalar_type() == ScalarType::Float8_e4m3fn;
  check.that(!fp8 || a.k.scalar_type() != ScalarType::Double,
             "k of dtype Float, Half or BFloat16 for float8 caches", "Double",
             "Convert k and v with .float().");
  const std::pair<const char*, const std::optional<Tensor>&> scales[] = {{"k_scale", a.k_scale},
                                                                         {"v_scale", a.v_scale}};
  for (const auto& [name, scale] : scales) {
    if (!scale) continue;
    check.that(fp8, concat("no ", name, " for caches of dtype ", dtype_text(a.k_cache.scalar_type())), "one",
               "Scales belong to float8_e4m3fn caches.");
    check.exactly(name, *scale, ScalarType::Float, {a.k.size(2)}, "[Hkv]", "k", a.k);
  }
}

void check_rope(const TensorChecks& check, const WriteArguments& a) {
  check.that(a.cos.has_value() == a.sin.has_value(), "cos and sin, or neither", "one of them",
             "Pass rope=(cos, sin).");
  if (!a.cos) return;
  const int64_t size = a.k.size(3);
  check.that(size % 2 == 0, "an even k.size(3) for rope", size, "Rotation pairs the halves of a head.");
  check.dim("cos", *a.cos, 2, "[positions, D] or [positions, D/2]");
  const int64_t rows = a.cos->size(0), width = a.cos->size(1);
  check.that(width == size || 2 * width == size, concat("cos.size(1) in {", size, ", ", size / 2, "}"), width,
             "A table has an angle per element, or per pair of elements e and e + D/2.");
  check.that(rows > 0 && rows <= INT32_MAX, "cos.size(0) in [1, 2^31)", rows, "Give the tables positions.");
  const bool wide = a.cos->scalar_type() == ScalarType::Float;
  check.exactly("cos", *a.cos, wide ? ScalarType::Float : a.k.scalar_type(), {rows, width},
                "[positions, D or D/2]", "k", a.k);
  check.exactly("sin", *a.sin, a.cos->scalar_type(), {rows, width}, "[positions, D or D/2]", "cos", *a.cos);
}

void check_slots(const TensorChecks& check, const WriteArguments& a, const TreeWriteCacheParams& p) {
  const HostValues<int32_t> counts(a.n_nodes), depths(a.depth);
  check_n_nodes(check, counts, p.batch, p.nodes);
  const SlotValues values(check, a.cache_seqlens, p.slots, a.block_table);
  for (int64_t b = 0; b < p.batch; ++b) {
    values.check(b, counts[b], concat("n_nodes[", b, "]"));
    for (int64_t i = 0; a.cos && i < counts[b]; ++i) {
      const int64_t position = values.length(b) + depths[b * p.nodes + i];
      check.index(position >= 0 && position < p.positions,
                  concat("cache_seqlens[", b, "] + depth[", b, ", ", i, "] in [0, ", p.positions, ")"),
                  position, "Give rope tables as many rows as positions.");
    }
  }
}

void set_strides(int64_t (&strides)[3], const Tensor& tensor) {
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

void tree_write_cache_(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                       const Tensor& cache_seqlens, const Tensor& depth, const Tensor& n_nodes,
                       const std::optional<Tensor>& block_table, const std::optional<Tensor>& cos,
                       const std::optional<Tensor>& sin, const std::optional<Tensor>& k_scale,
                       const std::optional<Tensor>& v_scale) {
  const TensorChecks check("tree_write_cache_");
  const WriteArguments a{k,       v,           k_cache, v_cache, cache_seqlens, depth,
                         n_nodes, block_table, cos,     sin,     k_scale,       v_scale};
  check_states(check, a);
  check_caches(check, a);
  const int64_t batch = k.size(0), nodes = k.size(1);
  check.exactly("cache_seqlens", cache_seqlens, ScalarType::Int, {batch}, "[B]", "k", k);
  check.exactly("depth", depth, ScalarType::Int, {batch, nodes}, "[B, N]", "k", k);
  check.exactly("n_nodes", n_nodes, ScalarType::Int, {batch}, "[B]", "k", k);
  check_rope(check, a);
  if (k.numel() == 0) return;

  TreeWriteCacheParams p{};
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.k_cache = k_cache.mutable_data_ptr();
  p.v_cache = v_cache.mutable_data_ptr();
  p.cache_seqlens = data<int32_t>(cache_seqlens);
  p.depth = data<int32_t>(depth);
  p.n_nodes = data<int32_t>(n_nodes);
  p.cos = cos ? cos->const_data_ptr() : nullptr;
  p.sin = sin ? sin->const_data_ptr() : nullptr;
  p.k_scale = data<float>(k_scale);
  p.v_scale = data<float>(v_scale);
  p.slots = cache_slots(k_cache, block_table);
  set_strides(p.k_stride, k);
  set_strides(p.v_stride, v);
  set_strides(p.k_cache_stride, k_cache);
  set_strides(p.v_cache_stride, v_cache);
  p.batch = int32_t(batch);
  p.nodes = int32_t(nodes);
  p.heads = int32_t(k.size(2));
  p.head_dim = int32_t(k.size(3));
  p.positions = cos ? int32_t(cos->size(0)) : 1;
  p.rope_width = cos ? int32_t(cos->size(1)) : 0;
  p.type = dtype_of_tensor(k);
  p.cache_type = dtype_of_tensor(k_cache);
  p.rope_type = cos ? dtype_of_tensor(*cos) : p.type;
  if (checks_values()) check_slots(check, a, p);
  RUN_KERNEL(tree_write_cache_, p, k, v, k_cache, v_cache, cache_seqlens, depth, n_nodes, block_table, cos,
             sin, k_scale, v_scale);
}

REGISTER_OP(
    tree_write_cache_,
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor depth, "
    "Tensor n_nodes, Tensor? block_table=None, Tensor? cos=None, Tensor? sin=None, Tensor? k_scale=None, "
    "Tensor? v_scale=None) -> ()")

}  // namespace
}  // namespace tranche
