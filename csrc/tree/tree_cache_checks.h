// What ops that write into KV caches ask of a cache, its lengths and its pages.
#pragma once

#include "core/torch_glue.h"
#include "tree/tree_slots.h"

namespace tranche {

inline int64_t slots_of_sequence(const Tensor& cache, const std::optional<Tensor>& block_table) {
  return block_table ? block_table->size(1) * cache.size(1) : cache.size(1);
}

// The layout of one cache tensor [B, S, Hkv, D], or [pages, page_size, Hkv, D] with a block table.
inline void check_cache_layout(const TensorChecks& check, Phrase name, const Tensor& cache,
                               const std::optional<Tensor>& block_table, int64_t batch, Phrase batch_name,
                               const Tensor& like, Phrase like_name) {
  check.dim(name, cache, 4, block_table ? "[pages, page_size, Hkv, D]" : "[B, S, Hkv, D]");
  check.same_device(name, cache, like_name, like);
  check.last_contiguous(name, cache);
  if (block_table) {
    const Tensor& table = *block_table;
    check.dim("block_table", table, 2, "[B, max_pages]");
    check.dtype("block_table", table, {ScalarType::Int});
    check.same_device("block_table", table, like_name, like);
    check.last_contiguous("block_table", table);
    check.equal("block_table.size(0)", table.size(0), batch_name, batch,
                "Give each sequence its row of pages.");
    check.that(cache.size(0) > 0, concat(name, ".size(0) > 0 (pages)"), "0", "Allocate pages.");
    check.that(cache.size(1) > 0, concat(name, ".size(1) > 0 (slots per page)"), "0",
               "Allocate pages with slots.");
  } else {
    check.equal(concat(name, ".size(0)"), cache.size(0), batch_name, batch,
                "A cache without block_table holds one row per sequence.");
  }
  check.that(slots_of_sequence(cache, block_table) <= INT32_MAX, "at most 2^31 - 1 slots in a sequence",
             slots_of_sequence(cache, block_table), "Use a smaller cache or block_table.");
}

inline CacheSlots cache_slots(const Tensor& cache, const std::optional<Tensor>& block_table) {
  return {data<int32_t>(block_table), block_table ? block_table->stride(0) : 0,
          int32_t(slots_of_sequence(cache, block_table)), int32_t(cache.size(1)), int32_t(cache.size(0))};
}

// Sequence b is about to use slots [lengths[b], lengths[b] + more): they and their pages must exist.
class SlotValues {
 public:
  SlotValues(const TensorChecks& check, const Tensor& cache_seqlens, const CacheSlots& slots,
             const std::optional<Tensor>& block_table)
      : check_(check),
        slots_(slots),
        lengths_(cache_seqlens),
        columns_(block_table ? block_table->size(1) : 0) {
    if (block_table) pages_.emplace(*block_table);
  }

  int64_t length(int64_t b) const { return lengths_[b]; }

  void check(int64_t b, int64_t more, Phrase what) const {
    const int64_t length = lengths_[b];
    check_.in_range("cache_seqlens", b, length, 0, slots_.capacity,
                    "It counts the committed tokens in the cache.");
    check_.index(length + more <= slots_.capacity,
                 concat("cache_seqlens[", b, "] + ", what, " <= ", slots_.capacity), length + more,
                 pages_ ? "Give block_table more pages." : "Allocate a longer cache.");
    if (!pages_) return;
    for (int64_t i = length / slots_.page_size; i * slots_.page_size < length + more; ++i) {
      const int64_t page = (*pages_)[b * columns_ + i];
      check_.index(page >= 0 && page < slots_.num_pages,
                   concat("block_table[", b, ", ", i, "] in [0, ", slots_.num_pages, ")"), page,
                   "Every page that holds a used slot must exist in the cache.");
    }
  }

 private:
  const TensorChecks& check_;
  const CacheSlots& slots_;
  HostValues<int32_t> lengths_;
  std::optional<HostValues<int32_t>> pages_;
  int64_t columns_;
};

}  // namespace tranche
