// One pass in order: a parent's row is complete before its children copy it.
#include "core/isa.h"
#include "core/parallel.h"
#include "tree/tree_ancestors.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

void one_tree(const TreeAncestorsParams& p, int64_t b) {
  const int32_t* parents = p.parent + b * p.parent_stride;
  int64_t* rows = p.ancestors + b * p.nodes * p.words;
  int32_t* depth = p.depth + b * p.nodes;
  const int64_t words = p.words;
  const int32_t count = p.n_nodes[b] < 0 ? 0 : (p.n_nodes[b] > p.nodes ? p.nodes : p.n_nodes[b]);

  for (int64_t i = 0; i < p.nodes; ++i) {
    int64_t* row = rows + i * words;
    int64_t parent = -1;
    if (i > 0 && i < count) {
      parent = parents[i];
      if (parent < 0 || parent >= i) parent = 0;
    }
    for (int64_t w = 0; w < words; ++w) row[w] = parent < 0 ? 0 : rows[parent * words + w];
    depth[i] = parent < 0 ? 0 : depth[parent] + 1;
    if (i < count) row[i / 64] = int64_t(uint64_t(row[i / 64]) | uint64_t(1) << (i % 64));
  }
}

}  // namespace

void tree_ancestors(const TreeAncestorsParams& p) {
  // A tree of 64 nodes takes well under a microsecond: waking threads pays only for many or large ones.
  const bool worth_threads = int64_t(p.batch) * p.nodes * p.words >= 65536;
  if (worth_threads) {
    parallel_for(p.batch, [&](int64_t b) { one_tree(p, b); });
  } else {
    for (int64_t b = 0; b < p.batch; ++b) one_tree(p, b);
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, tree_ancestors, TreeAncestorsParams)
