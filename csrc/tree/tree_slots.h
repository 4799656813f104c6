// Where a slot of a sequence lies in a contiguous or a paged KV cache: the one place that ops which move
// cache rows compute it.
#pragma once

#include <cstdint>

#include "core/numeric.h"

namespace tranche {

// What a kernel needs to find a slot. Without a block table sequence b owns row b of the cache.
struct CacheSlots {
  const int32_t* block_table;  // [B, max_pages], or null
  int64_t block_table_stride;  // of B, in elements; a row is contiguous
  int32_t capacity;            // slots a sequence can hold: S, or max_pages * page_size
  int32_t page_size;           // slots per page; capacity when there is no block table
  int32_t num_pages;           // pages in the cache, at least 1; B when there is no block table
};

// The first two indices into the cache tensor.
struct SlotPlace {
  int64_t page, slot;
};

// `slot` lies in [0, capacity); page numbers are clamped into the cache.
TRANCHE_HD SlotPlace place_of(const CacheSlots& slots, int64_t sequence, int32_t slot) {
  if (slots.block_table == nullptr) return {sequence, slot};
  int32_t page = slots.block_table[sequence * slots.block_table_stride + slot / slots.page_size];
  page = page < 0 ? 0 : (page >= slots.num_pages ? slots.num_pages - 1 : page);
  return {page, slot % slots.page_size};
}

TRANCHE_HD int32_t clamped(int32_t x, int32_t low, int32_t high) {
  return x < low ? low : (x > high ? high : x);
}

}  // namespace tranche
