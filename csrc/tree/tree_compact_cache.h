// Keeping the accepted path of each tree in every layer's cache: what a kernel of this op receives.
#pragma once

#include <cstdint>

#include "tree/tree_slots.h"

namespace tranche {

constexpr int kMaxCompactTensors = 256;  // cache tensors of one launch
constexpr int kMaxCompactLayouts = 8;    // different strides and row sizes among them

// Strides in bytes. A row is the D elements of one head in one slot.
struct CompactLayout {
  int64_t stride[3];  // of B or page, slot, Hkv
  int32_t heads, row_bytes;
};

// Row path[b, j] of sequence b's tree, in slot cache_seqlens[b] + path[b, j], moves to slot cache_seqlens[b]
// + j, for j = 1..length[b]; then cache_seqlens[b] += length[b] + 1. Paths ascend, so path[b, j] >= j and
// moving in ascending order of j never overwrites a row that is still to be read.
//
// Where path[b, 0] is -1 nothing was accepted, not even the root: such a sequence is left alone.
//
// What the cpu backend refuses: another path[b, 0] than 0 counts as -1; length is clamped to [0, N - 1] and
// so that no slot past the capacity is written; an entry of path outside [j, N), or past the capacity, leaves
// slot j as it is. A cache_seqlens outside [0, capacity] moves nothing out of bounds and is left with an
// unspecified value.
struct TreeCompactCacheParams {
  void* caches[kMaxCompactTensors];  // [B, S, Hkv, D], or [num_pages, page_size, Hkv, D]
  CompactLayout layouts[kMaxCompactLayouts];
  uint8_t layout_of[kMaxCompactTensors];
  const int32_t* path;     // [B, N], contiguous
  const int32_t* length;   // [B]
  int32_t* cache_seqlens;  // [B], in and out
  CacheSlots slots;
  int32_t batch, nodes, tensors;
  int32_t vector_bytes;  // 1, 2, 4, 8 or 16: divides every address, stride and row
  bool advance;          // false in all launches but the last, when one is not enough
};
static_assert(sizeof(TreeCompactCacheParams) <= 4096, "CUDA's limit of kernel parameters");

// Rows to move for one sequence whose first uncommitted slot is `base`: j = 1..result; -1 if it is left
// alone.
TRANCHE_HD int32_t moved_rows(const TreeCompactCacheParams& p, int32_t b, int32_t base) {
  if (p.path[int64_t(b) * p.nodes] != 0) return -1;
  const int32_t length = clamped(p.length[b], 0, p.nodes - 1);
  const int32_t room = p.slots.capacity - 1 - base;
  return length < room ? length : room;
}

// The node whose row goes to place j of the path.
TRANCHE_HD int32_t source_node(const TreeCompactCacheParams& p, int32_t b, int32_t base, int32_t j) {
  const int32_t node = p.path[int64_t(b) * p.nodes + j];
  const bool valid = node >= j && node < p.nodes && node < p.slots.capacity - base;
  return valid ? node : j;
}

namespace cpu {
void tree_compact_cache_(const TreeCompactCacheParams&);
}  // namespace cpu

namespace cuda {
void tree_compact_cache_(const TreeCompactCacheParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
