// One pass in order: a node is on the path when its parent is the path's last node and its token the
// target's. Parents come before their children, and once a child is taken its later siblings no longer match.
#include "core/isa.h"
#include "core/parallel.h"
#include "tree/tree_verify_greedy.h"
#include "tree/tree_walk.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

void one_tree(const TreeVerifyGreedyParams& p, int64_t b) {
  const int64_t row = b * p.nodes;
  const int64_t *tokens = p.tokens + row, *target = p.target + row;
  const int32_t* parents = p.parent + row;
  const int32_t count = clamped_count(p.n_nodes[b], p.nodes);
  int32_t* path = p.path + row;

  int32_t node = 0, on_path = 0;
  if (count > 0) path[on_path++] = 0;
  for (int32_t i = 1; i < count; ++i) {
    if (tokens[i] == target[node] && parent_of(parents, i) == node) path[on_path++] = node = i;
  }
  p.length[b] = on_path > 0 ? on_path - 1 : 0;
  p.next_token[b] = on_path > 0 ? target[node] : -1;
  for (int32_t i = on_path; i < p.nodes; ++i) path[i] = -1;
}

}  // namespace

void tree_verify_greedy(const TreeVerifyGreedyParams& p) {
  // A tree of 64 nodes takes a tenth of a microsecond: waking threads pays only for many or large ones.
  const bool worth_threads = int64_t(p.batch) * p.nodes >= 65536;
  if (worth_threads) {
    parallel_for(p.batch, [&](int64_t b) { one_tree(p, b); });
  } else {
    for (int64_t b = 0; b < p.batch; ++b) one_tree(p, b);
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, tree_verify_greedy, TreeVerifyGreedyParams)
