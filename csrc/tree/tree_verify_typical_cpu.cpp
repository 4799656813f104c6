// Nodes in order, so that a row is read only if its node is accepted: twice where it has children, once (for
// the largest logit) where it has none.
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "tree/tree_row_cpu.h"
#include "tree/tree_typical.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

// Sums over blocks of tokens at fixed places: bits do not depend on anything but the row.
template <class T>
TypicalRow read_row(const TreeVerifyTypicalParams& p, const T* row, float max) {
  alignas(64) float x[kRowBlock];
  const Vec vmaximum = vset(max), factor = vset(p.factor), zero = vset(0.0f);
  const Vec least = vset(kLeastTypicalExponent);
  double sum = 0, moment = 0;
  for (int64_t first = 0; first < p.vocab; first += kRowBlock) {
    const int count = int(p.vocab - first < kRowBlock ? p.vocab - first : kRowBlock);
    row_to_float(row + first, x, count);
    for (int i = count; i % kWidth != 0; ++i) x[i] = -kInf;
    Vec sums = zero, moments = zero;
    for (int i = 0; i < count; i += kWidth) {
      const Vec logit = vload(x + i);
      const Vec y = vselect(veq(logit, vmaximum), zero, vmul(vsub(logit, vmaximum), factor));
      const Vec live = vselect(vlt(least, y), y, vset(-200.0f));
      const Vec e = vexp2<6>(live);
      sums = vadd(sums, e);
      moments = vfma(e, live, moments);
    }
    alignas(64) float lanes[2][kWidth];
    vstore(lanes[0], sums);
    vstore(lanes[1], moments);
    for (int i = 0; i < kWidth; ++i) {
      sum += lanes[0][i];
      moment += lanes[1][i];
    }
  }
  const float log_sum = max > -kInf ? float(__builtin_log2(sum)) : -kInf;
  return typical_row(p, max, float(sum), float(moment), log_sum);
}

template <class T>
void one_sequence(const TreeVerifyTypicalParams& p, int64_t b) {
  const int64_t base = b * p.nodes;
  const int32_t* parents = p.parent + base;
  const int32_t count = clamped_count(p.n_nodes[b], p.nodes);
  bool has_children[kMaxTreeNodes], accepted[kMaxTreeNodes];
  for (int32_t i = 0; i < count; ++i) has_children[i] = false;
  for (int32_t i = 1; i < count; ++i) has_children[parent_of(parents, i)] = true;
  for (int32_t node = 0; node < count; ++node) {
    accepted[node] =
        node == 0 || (accepted[parent_of(parents, node)] && !__builtin_isnan(p.edge[base + node]));
    if (!accepted[node]) continue;
    const T* row = static_cast<const T*>(p.logits) + b * p.logits_stride[0] + node * p.logits_stride[1];
    const float max = largest(row, p.vocab);
    p.largest[base + node] = int32_t(first_largest(row, p.vocab, max));
    if (!has_children[node]) continue;
    const TypicalRow read = read_row(p, row, max);
    for (int32_t i = node + 1; i < count; ++i) {
      if (parent_of(parents, i) != node) continue;
      p.edge[base + i] = max > -kInf ? typical_edge(p, read, row, p.tokens[base + i]) : __builtin_nanf("");
    }
  }
  float sums[kMaxTreeNodes];
  int32_t depths[kMaxTreeNodes];
  for (int32_t i = 0; i < count; ++i) {
    depths[i] = i > 0 ? parent_of(parents, i) : -1;
    // below nodes that are not accepted no edge was looked at
    sums[i] = i > 0 && accepted[depths[i]] ? p.edge[base + i] : __builtin_nanf("");
  }
  typical_path(p, b, sums, depths);
}

}  // namespace

void tree_verify_typical(const TreeVerifyTypicalParams& p) {
  with_type<float, half, bf16>("tree_verify_typical", p.type, [&](auto t) {
    parallel_for(p.batch, [&](int64_t b) { one_sequence<decltype(t)>(p, b); });
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, tree_verify_typical, TreeVerifyTypicalParams)
