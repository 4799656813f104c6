// Which slots of a cache a row of a tree sees, and where a slot lies: for CPU and CUDA kernels alike.
//
// Everything that only the device knows is clamped here, so that no kernel reads or writes out of bounds.
#pragma once

#include "core/numeric.h"
#include "tree/tree_attention.h"

namespace tranche::slots {

TRANCHE_HD int clamp(int x, int low, int high) { return x < low ? low : (x > high ? high : x); }

TRANCHE_HD int node_count(const TreeAttentionParams& p, int b) {
  return clamp(p.n_nodes[b], 0, p.nodes < p.capacity ? p.nodes : p.capacity);
}

// Committed tokens; `nodes` is node_count(p, b).
TRANCHE_HD int committed(const TreeAttentionParams& p, int b, int nodes) {
  return clamp(p.cache_seqlens[b], 0, p.capacity - nodes);
}

// The row of the cache, counted over [B, S] or [pages, page_size], that holds a slot of sequence b.
TRANCHE_HD int64_t cache_row(const TreeAttentionParams& p, int b, int slot) {
  if (p.block_table == nullptr) return int64_t(b) * p.capacity + slot;
  const int page = slot / p.page_size;
  const int entry = clamp(p.block_table[b * p.block_table_stride + page], 0, p.num_pages - 1);
  return int64_t(entry) * p.page_size + (slot - page * p.page_size);
}

// Its first element, from the cache's.
TRANCHE_HD int64_t cache_offset(const TreeAttentionParams& p, const int64_t* stride, int64_t row, int head) {
  const int64_t outer = row / p.page_size;
  return outer * stride[0] + (row - outer * p.page_size) * stride[1] + head * stride[2];
}

// The `count` lowest bits.
TRANCHE_HD uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : (count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1);
}

TRANCHE_HD int node_depth(const TreeAttentionParams& p, int b, int node) {
  return clamp(p.depth[int64_t(b) * p.nodes + node], 0, node);
}

// The first slot that no window hides from `node`.
TRANCHE_HD int64_t window_begin(const TreeAttentionParams& p, int b, int length, int node) {
  if (p.window <= 0) return 0;
  const int64_t begin = int64_t(length) + node_depth(p, b, node) - p.window + 1;
  return begin > 0 ? begin : 0;
}

// Bit c: `node` sees slot first + c.
TRANCHE_HD uint64_t visible(const TreeAttentionParams& p, int b, int length, int node, int first) {
  const uint64_t prefix = low_bits(int64_t(length) - first);
  const uint64_t seen = prefix & ~low_bits(window_begin(p, b, length, node) - first);
  const int j = first - length;  // the node in slot `first`
  if (j > node || j <= -64) return seen;
  const int64_t* ancestors = p.ancestors + (int64_t(b) * p.nodes + node) * p.words;
  uint64_t bits;
  if (j < 0) {
    bits = uint64_t(ancestors[0]) << -j;
  } else {
    bits = uint64_t(ancestors[j / 64]) >> (j % 64);
    if (j % 64 != 0 && j / 64 + 1 < p.words) bits |= uint64_t(ancestors[j / 64 + 1]) << (64 - j % 64);
  }
  if (node - j < 64) bits |= uint64_t(1) << (node - j);
  bits &= low_bits(int64_t(node) - j + 1) & ~prefix;
  if (p.window > 0) {
    const int64_t depth = node_depth(p, b, node);
    for (int c = j < 0 ? -j : 0; depth >= p.window && c < 64 && j + c <= node; ++c) {
      if (node_depth(p, b, j + c) <= depth - p.window) bits &= ~(uint64_t(1) << c);
    }
  }
  return seen | bits;
}

}  // namespace tranche::slots
