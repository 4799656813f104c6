// tranche::tree_compact_cache_: schema, checks.
#include "tree/tree_compact_cache.h"

#include "tree/tree_cache_checks.h"
#include "tree/tree_checks.h"

namespace tranche {
namespace {

// The greatest power of two up to 16 that divides everything it has seen.
class CommonAlignment {
 public:
  void include(uint64_t x) {
    while (x % bytes_ != 0) bytes_ /= 2;
  }
  int32_t bytes() const { return bytes_; }

 private:
  int32_t bytes_ = 16;
};

CompactLayout layout_of(const Tensor& cache) {
  const int64_t size = cache.element_size();
  return {{cache.stride(0) * size, cache.stride(1) * size, cache.stride(2) * size},
          int32_t(cache.size(2)),
          int32_t(cache.size(3) * size)};
}

bool same(const CompactLayout& a, const CompactLayout& b) {
  return a.stride[0] == b.stride[0] && a.stride[1] == b.stride[1] && a.stride[2] == b.stride[2] &&
         a.heads == b.heads && a.row_bytes == b.row_bytes;
}

void check_caches(const TensorChecks& check, const std::vector<Tensor>& caches, int64_t batch,
                  const std::optional<Tensor>& block_table, const Tensor& path) {
  for (size_t i = 0; i < caches.size(); ++i) {
    const auto name = "caches[" + std::to_string(i) + "]";
    check_cache_layout(check, name, caches[i], block_table, batch, "path.size(0)", path, "path");
    check.dtype(name, caches[i],
                {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double,
                 ScalarType::Float8_e4m3fn});
    check.same_sizes(name, caches[i], "caches[0]", caches[0], 2,
                     "All caches of a call hold the same sequences in the same slots.");
  }
}

void check_paths(const TensorChecks& check, const Tensor& path, const Tensor& length,
                 const Tensor& cache_seqlens, const CacheSlots& slots,
                 const std::optional<Tensor>& block_table) {
  const HostValues<int32_t> paths(path), lengths(length);
  const SlotValues values(check, cache_seqlens, slots, block_table);
  const int64_t nodes = path.size(1);
  for (int64_t b = 0; b < path.size(0); ++b) {
    check.in_range("length", b, lengths[b], 0, nodes - 1, "It counts the accepted nodes after the root.");
    const bool nothing = paths[b * nodes] == -1 && lengths[b] == 0;
    int64_t last = -1;
    for (int64_t j = 0; !nothing && j <= lengths[b]; ++j) {
      const int64_t before = last;
      last = paths[b * nodes + j];
      check.index(j > 0 || last == 0, concat("path[", b, ", 0] == 0 (the root)"), last,
                  "An accepted path begins at the root.");
      check.index(last > before && last < nodes,
                  concat("path[", b, ", ", j, "] in (", before, ", ", nodes, ")"), last,
                  "An accepted path goes from the root to ever larger nodes.");
    }
    values.check(b, last + 1, "the accepted nodes");
  }
}

void tree_compact_cache_(const std::vector<Tensor> caches, const Tensor& path, const Tensor& length,
                         const Tensor& cache_seqlens, const std::optional<Tensor>& block_table) {
  const TensorChecks check("tree_compact_cache_");
  check.dim("path", path, 2, "[B, N]");
  check.dtype("path", path, {ScalarType::Int});
  check.contiguous("path", path);
  const int64_t batch = path.size(0), nodes = path.size(1);
  check_node_count(check, nodes);
  check.exactly("length", length, ScalarType::Int, {batch}, "[B]", "path", path);
  check.exactly("cache_seqlens", cache_seqlens, ScalarType::Int, {batch}, "[B]", "path", path);
  check.that(!caches.empty(), "at least one cache", "none", "Pass every layer's keys and values.");
  check_caches(check, caches, batch, block_table, path);
  if (batch == 0 || nodes == 0) return;

  TreeCompactCacheParams p{};
  p.path = data<int32_t>(path);
  p.length = data<int32_t>(length);
  p.cache_seqlens = mutable_data<int32_t>(cache_seqlens);
  p.slots = cache_slots(caches[0], block_table);
  p.batch = int32_t(batch);
  p.nodes = int32_t(nodes);
  if (checks_values()) check_paths(check, path, length, cache_seqlens, p.slots, block_table);

  for (size_t first = 0; first < caches.size(); first += kMaxCompactTensors) {
    CommonAlignment alignment;
    int layouts = 0;
    p.tensors =
        int32_t(caches.size() - first < kMaxCompactTensors ? caches.size() - first : kMaxCompactTensors);
    for (int i = 0; i < p.tensors; ++i) {
      const Tensor& cache = caches[first + i];
      const CompactLayout layout = layout_of(cache);
      int l = 0;
      while (l < layouts && !same(p.layouts[l], layout)) ++l;
      check.that(l < kMaxCompactLayouts,
                 concat("at most ", kMaxCompactLayouts, " different strides among 256 caches"), "more",
                 "Allocate the layers' caches alike.");
      if (l == layouts) p.layouts[layouts++] = layout;
      p.layout_of[i] = uint8_t(l);
      p.caches[i] = cache.mutable_data_ptr();
      alignment.include(uint64_t(reinterpret_cast<uintptr_t>(p.caches[i])));
      for (int64_t stride : layout.stride) alignment.include(uint64_t(stride));
      alignment.include(uint64_t(layout.row_bytes));
    }
    p.vector_bytes = alignment.bytes();
    p.advance = first + kMaxCompactTensors >= caches.size();
    RUN_KERNEL(tree_compact_cache_, p, path, length, cache_seqlens, caches, block_table);
  }
}

REGISTER_OP(tree_compact_cache_,
            "(Tensor(a!)[] caches, Tensor path, Tensor length, Tensor(b!) cache_seqlens, "
            "Tensor? block_table=None) -> ()")

}  // namespace
}  // namespace tranche
