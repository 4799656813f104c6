// Ancestors of one tree in one pass: a parent's row is complete before its children copy it.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

// ancestors [nodes, words] and depth [nodes] from parents [nodes], of which the first `count` are in use. A
// parent that is none counts as the root.
TRANCHE_INLINE void write_ancestors(const int32_t* parents, int64_t count, int64_t nodes, int64_t words,
                                    int64_t* ancestors, int32_t* depth) {
  for (int64_t i = 0; i < nodes; ++i) {
    int64_t* row = ancestors + i * words;
    int64_t parent = -1;
    if (i > 0 && i < count) {
      parent = parents[i];
      if (parent < 0 || parent >= i) parent = 0;
    }
    for (int64_t w = 0; w < words; ++w) row[w] = parent < 0 ? 0 : ancestors[parent * words + w];
    depth[i] = parent < 0 ? 0 : depth[parent] + 1;
    if (i < count) row[i / 64] = int64_t(uint64_t(row[i / 64]) | uint64_t(1) << (i % 64));
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA
