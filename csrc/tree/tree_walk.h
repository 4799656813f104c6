// What the verifying kernels share of a tree's walk.
#pragma once

#include <cstdint>

#include "core/numeric.h"

namespace tranche {

TRANCHE_HD int32_t clamped_count(int32_t n_nodes, int32_t nodes) {
  return n_nodes < 0 ? 0 : (n_nodes > nodes ? nodes : n_nodes);
}

// The parent of node i > 0; an entry that is no parent counts as the root.
TRANCHE_HD int32_t parent_of(const int32_t* parents, int32_t i) {
  const int32_t parent = parents[i];
  return parent < 0 || parent >= i ? 0 : parent;
}

}  // namespace tranche
