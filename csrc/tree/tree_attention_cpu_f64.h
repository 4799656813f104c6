// tree_attention in fp64: the plain form, one row at a time, for gradient checks and as an oracle.
#pragma once

#include "tree/tree_attention_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

static size_t workspace_bytes_f64(const TreeAttentionParams& p) {
  // Per worker: the path of a row, and the scores of a chunk.
  const int64_t row =
      round_up(int64_t(p.nodes) * int64_t(sizeof(int32_t)), 64) + kChunk * int64_t(sizeof(double));
  return size_t(num_threads() * row);
}

static void row_f64(const TreeAttentionParams& p, int b, int i, int head, int32_t* path, double* scores) {
  const int dim = p.head_dim, head_kv = head / (p.heads_q / p.heads_kv), seqlen = committed(p, b);
  double* out = out_row<double>(p, b, i, head);
  const double* q =
      static_cast<const double*>(p.q) + b * p.q_stride[0] + i * p.q_stride[1] + head * p.q_stride[2];
  const CacheRows k_rows(p, p.k_cache, p.k_stride, sizeof(double), b, head_kv);
  const CacheRows v_rows(p, p.v_cache, p.v_stride, sizeof(double), b, head_kv);
  const double factor = p.scale_f64 * (p.k_scale ? double(p.k_scale[head_kv]) : 1.0);
  const double v_scale = p.v_scale ? double(p.v_scale[head_kv]) : 1.0;

  int ancestors = 0;
  for_each_ancestor(p, b, i, [&](int j) { path[ancestors++] = j; });
  const int64_t position = int64_t(seqlen) + node_depth(p, b, i), keys = int64_t(seqlen) + ancestors;
  const auto visible = [&](int64_t x) {
    return in_window(p, x < seqlen ? x : seqlen + node_depth(p, b, path[x - seqlen]), position);
  };
  const auto slot = [&](int64_t x) { return x < seqlen ? x : seqlen + int64_t(path[x - seqlen]); };

  double m = -__builtin_inf(), l = 0.0;
  for (int d = 0; d < dim; ++d) out[d] = 0.0;
  for (int64_t first = 0; first < keys; first += kChunk) {
    const int count = int(least<int64_t>(keys - first, kChunk));
    double top = m;
    for (int x = 0; x < count; ++x) {
      if (!visible(first + x)) continue;
      const double* k = reinterpret_cast<const double*>(k_rows.row(slot(first + x)));
      double s = 0.0;
      for (int d = 0; d < dim; ++d) s += q[d] * k[d];
      s *= factor;
      if (p.softcap != 0.0f) s = double(p.softcap) * __builtin_tanh(s / double(p.softcap));
      scores[x] = s;
      if (s > top) top = s;
    }
    if (top > m) {
      const double alpha = __builtin_exp(m - top);
      l *= alpha;
      for (int d = 0; d < dim; ++d) out[d] *= alpha;
      m = top;
    }
    for (int x = 0; x < count; ++x) {
      if (!visible(first + x)) continue;
      const double* v = reinterpret_cast<const double*>(v_rows.row(slot(first + x)));
      const double w = __builtin_exp(scores[x] - m);
      l += w;
      for (int d = 0; d < dim; ++d) out[d] += w * v[d];
    }
  }
  double denominator = l, numerator = 1.0;
  if (p.sinks) {
    const double sink = double(p.sinks[head]), top = sink > m ? sink : m;
    if (top > -__builtin_inf()) {
      numerator = __builtin_exp(m - top);
      denominator = l * numerator + __builtin_exp(sink - top);
    }
  }
  const double weight = l == 0.0 ? 0.0 : numerator / denominator * v_scale;
  for (int d = 0; d < dim; ++d) out[d] = out[d] * weight + 0.0;
  if (p.lse) {
    p.lse[(int64_t(b) * p.nodes + i) * p.heads_q + head] = l == 0.0 ? -kInf : float(m + __builtin_log(l));
  }
}

static void run_f64(const TreeAttentionParams& p) {
  const int64_t rows = int64_t(p.batch) * p.nodes * p.heads_q, workers = least<int64_t>(num_threads(), rows);
  const int64_t bytes = int64_t(workspace_bytes_f64(p)) / num_threads();
  int64_t next = 0;
  parallel_for(workers, [&](int64_t w) {
    Arena arena(static_cast<char*>(p.workspace) + w * bytes);
    int32_t* path = arena.take<int32_t>(p.nodes);
    double* scores = arena.take<double>(kChunk);
    for (;;) {
      const int64_t row = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (row >= rows) break;
      const int head = int(row % p.heads_q), i = int(row / p.heads_q % p.nodes),
                b = int(row / p.heads_q / p.nodes);
      if (i < node_count(p, b)) row_f64(p, b, i, head, path, scores);
    }
  });
  for (int b = 0; b < p.batch; ++b) clear_unused<double>(p, b);
}

}  // namespace tranche::cpu::TRANCHE_ISA
