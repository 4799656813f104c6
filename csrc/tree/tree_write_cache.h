// Putting the nodes' keys and values into their slots: what a kernel of this op receives.
#pragma once

#include <cstdint>

#include "core/numeric.h"
#include "tree/tree_slots.h"

namespace tranche {

// Node i < n_nodes[b] goes to slot cache_seqlens[b] + i. With tables, keys are first rotated at position
// cache_seqlens[b] + depth[b, i], pairing element e with e + D/2:
//   k'[e]       = k[e] cos[e] - k[e + D/2] sin[e]
//   k'[e + D/2] = k[e + D/2] cos[e + D/2] + k[e] sin[e + D/2]      (entry e - D/2 of tables that are D/2
//   wide)
// Products and sums are rounded to float one by one (double for f64), and to the cache's type at the end. A
// cache of type e4m3 stores value / scale.
//
// What the cpu backend refuses: n_nodes is clamped to [0, min(N, capacity)], cache_seqlens to [0, capacity -
// n_nodes], a position to the table's last row.
struct TreeWriteCacheParams {
  const void* k;                 // [B, N, Hkv, D], type; rows contiguous
  const void* v;                 // likewise
  void* k_cache;                 // [B, S, Hkv, D], or [num_pages, page_size, Hkv, D]; cache_type
  void* v_cache;                 // likewise
  const int32_t* cache_seqlens;  // [B]
  const int32_t* depth;          // [B, N]
  const int32_t* n_nodes;        // [B]
  const void* cos;               // [positions, rope_width], rope_type, contiguous; or null
  const void* sin;               // likewise
  const float* k_scale;          // [Hkv], or null for 1
  const float* v_scale;          // [Hkv], or null for 1

  CacheSlots slots;
  int64_t k_stride[3];  // in elements, of B, N, Hkv
  int64_t v_stride[3];
  int64_t k_cache_stride[3];  // of B or page, slot, Hkv
  int64_t v_cache_stride[3];
  int32_t batch, nodes, heads, head_dim;
  int32_t positions;   // rows of the tables, at least 1
  int32_t rope_width;  // D, or D/2 when both halves share their angles
  DType type;          // of k and v
  DType cache_type;    // the same, or e4m3
  DType rope_type;     // f32, or the same as type
};

// Where sequence b's nodes go: slots [first, first + count).
struct WriteRange {
  int32_t first, count;
};

TRANCHE_HD WriteRange write_range(const TreeWriteCacheParams& p, int64_t b) {
  const int32_t most = p.nodes < p.slots.capacity ? p.nodes : p.slots.capacity;
  const int32_t count = clamped(p.n_nodes[b], 0, most);
  return {clamped(p.cache_seqlens[b], 0, p.slots.capacity - count), count};
}

TRANCHE_HD int32_t rope_row(const TreeWriteCacheParams& p, int64_t b, int32_t node) {
  const int64_t position = int64_t(p.cache_seqlens[b]) + p.depth[b * p.nodes + node];
  return position < 0 ? 0 : (position >= p.positions ? p.positions - 1 : int32_t(position));
}

namespace cpu {
void tree_write_cache_(const TreeWriteCacheParams&);
}  // namespace cpu

namespace cuda {
void tree_write_cache_(const TreeWriteCacheParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
