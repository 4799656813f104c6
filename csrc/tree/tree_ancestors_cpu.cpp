// A tree is a task.
#include "tree/tree_ancestors_cpu.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "tree/tree_ancestors.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

void one_tree(const TreeAncestorsParams& p, int64_t b) {
  const int32_t count = p.n_nodes[b] < 0 ? 0 : (p.n_nodes[b] > p.nodes ? p.nodes : p.n_nodes[b]);
  write_ancestors(p.parent + b * p.parent_stride, count, p.nodes, p.words,
                  p.ancestors + b * p.nodes * p.words, p.depth + b * p.nodes);
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
