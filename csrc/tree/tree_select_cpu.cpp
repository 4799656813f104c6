// A tree is a task: keys in one pass (parents come first), the least kept key bit by bit, then one pass that
// numbers the kept candidates.
#include "core/isa.h"
#include "core/ordered.h"
#include "core/parallel.h"
#include "tree/tree_ancestors_cpu.h"
#include "tree/tree_select.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

template <class Key>
int count_at_least(const Key* keys, int n, Key bound) {
  Key count = 0;  // as wide as a key, so that lanes of a vector match
  for (int i = 0; i < n; ++i) count += keys[i] >= bound;
  return int(count);
}

// The `kept`-th greatest of n keys, for kept >= 1.
template <class Key>
Key kth_greatest(const Key* keys, int n, int kept) {
  Key bound = 0;
  for (int bit = 8 * int(sizeof(Key)) - 1; bit >= 0; --bit) {
    const Key higher = bound | Key(1) << bit;
    if (count_at_least(keys, n, higher) >= kept) bound = higher;
  }
  return bound;
}

template <class Score>
void one_tree(const TreeSelectParams& p, int64_t b) {
  using Key = decltype(ordered_bits(Score()));
  Key keys[kMaxCandidates];
  int32_t node_of[kMaxCandidates];
  const Score* scores = static_cast<const Score*>(p.scores) + b * p.candidates;
  const int32_t* parents = p.parents + b * p.candidates;
  const int n = p.candidates, kept = kept_candidates(p), count = kept + 1;
  int32_t* parent = p.parent + b * p.nodes;
  int64_t* node_tokens = p.node_tokens + b * p.nodes;
  int32_t* index = p.index + b * p.nodes;

  for (int c = 0; c < n; ++c) {
    keys[c] = ordered_bits(scores[c]);
    const int32_t up = parents[c];
    if (up >= 0 && up < c && keys[up] < keys[c]) keys[c] = keys[up];
  }
  parent[0] = -1;
  node_tokens[0] = p.root_tokens[b];
  index[0] = -1;
  if (kept > 0) {
    const Key least = kth_greatest(keys, n, kept);
    // Keys above the least are all kept, and of those equal to it the first ones.
    int spare = kept - (least == Key(-1) ? 0 : count_at_least(keys, n, Key(least + 1)));
    int node = 1;
    for (int c = 0; c < n; ++c) {
      const bool keep = keys[c] > least || (keys[c] == least && spare-- > 0);
      if (!keep) continue;
      const int32_t up = parents[c];
      node_of[c] = node;
      parent[node] = up >= 0 && up < c ? node_of[up] : 0;
      node_tokens[node] = p.tokens[b * n + c];
      index[node] = c;
      ++node;
    }
  }
  for (int i = count; i < p.nodes; ++i) {
    parent[i] = -1;
    node_tokens[i] = 0;
    index[i] = -1;
  }
  p.n_nodes[b] = count;
  write_ancestors(parent, count, p.nodes, p.words, p.ancestors + b * p.nodes * p.words,
                  p.depth + b * p.nodes);
}

}  // namespace

void tree_select(const TreeSelectParams& p) {
  const bool worth_threads = p.batch > 1 && int64_t(p.batch) * (p.candidates + p.nodes * p.words) >= 8192;
  const auto task = [&](int64_t b) { p.type == DType::f64 ? one_tree<double>(p, b) : one_tree<float>(p, b); };
  if (worth_threads) {
    parallel_for(p.batch, task);
  } else {
    for (int64_t b = 0; b < p.batch; ++b) task(b);
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, tree_select, TreeSelectParams)
