// Rows are copied in order of the path; a sequence of one cache tensor is a task.
#include <cstring>

#include "core/isa.h"
#include "core/parallel.h"
#include "tree/tree_compact_cache.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

char* slot_address(const TreeCompactCacheParams& p, char* cache, const CompactLayout& layout, int32_t b,
                   int32_t slot) {
  const SlotPlace place = place_of(p.slots, b, slot);
  return cache + place.page * layout.stride[0] + place.slot * layout.stride[1];
}

void one_sequence(const TreeCompactCacheParams& p, int32_t b, int32_t tensor) {
  const CompactLayout& layout = p.layouts[p.layout_of[tensor]];
  char* cache = static_cast<char*>(p.caches[tensor]);
  const int32_t base = clamped(p.cache_seqlens[b], 0, p.slots.capacity), rows = moved_rows(p, b, base);
  const bool heads_adjoin = layout.stride[2] == layout.row_bytes;
  const int32_t pieces = heads_adjoin ? 1 : layout.heads;
  const int64_t bytes = heads_adjoin ? int64_t(layout.heads) * layout.row_bytes : layout.row_bytes;
  for (int32_t j = 1; j <= rows; ++j) {
    const int32_t node = source_node(p, b, base, j);
    if (node == j) continue;
    const char* from = slot_address(p, cache, layout, b, base + node);
    char* to = slot_address(p, cache, layout, b, base + j);
    if (from == to) continue;  // only a broken block table puts two slots in one place
    for (int32_t h = 0; h < pieces; ++h)
      memcpy(to + h * layout.stride[2], from + h * layout.stride[2], size_t(bytes));
  }
}

}  // namespace

void tree_compact_cache_(const TreeCompactCacheParams& p) {
  const int64_t tasks = int64_t(p.batch) * p.tensors;
  const bool worth_threads = tasks * p.layouts[0].heads * p.layouts[0].row_bytes >= 65536;
  const auto task = [&](int64_t i) { one_sequence(p, int32_t(i / p.tensors), int32_t(i % p.tensors)); };
  if (worth_threads) {
    parallel_for(tasks, task);
  } else {
    for (int64_t i = 0; i < tasks; ++i) task(i);
  }
  if (!p.advance) return;
  for (int32_t b = 0; b < p.batch; ++b) {
    const int32_t base = clamped(p.cache_seqlens[b], 0, p.slots.capacity);
    p.cache_seqlens[b] = base + moved_rows(p, b, base) + 1;
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, tree_compact_cache_, TreeCompactCacheParams)
