// tree_attention with fp32 FMAs, for every instruction set and every type but fp64.
//
// Keys and values of a chunk are converted to fp32 once, whatever their strides and pages, and then serve all
// rows of the block. Both products are register blocks of keys (or output columns) times vectors of rows: one
// broadcast of a key's element per three FMAs.
#pragma once

#include "tree/tree_attention_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

#if defined(__AVX512F__)
constexpr int kBlockKeys = 8;
#else
constexpr int kBlockKeys = 4;
#endif
constexpr int kBlockVecs = 3;
constexpr int kVecsPerTile = kLanes / kWidth;

// Rough cycles, by which the next chunk's rows are fetched meanwhile: of converting a key or a value, and of
// one element of a head for a vector of rows in both products.
constexpr float kConvertKey = 20.0f, kProduct = 1.0f;

// Vector v of a block of rows in an array of tiles.
TRANCHE_INLINE int64_t vec_offset(int v, int64_t tile_stride) {
  return v / kVecsPerTile * tile_stride + v % kVecsPerTile * kWidth;
}

// scores[v][key] = <q[v], k[key]> for kBlockKeys keys and kVecs vectors of rows from `first` on. Chains of
// kChain products, added in order: one chain over a whole head would round twice as badly as torch's.
template <int kVecs>
TRANCHE_INLINE void score_block(const float* q, int64_t q_tile, const float* k, int dim, float* scores,
                                int64_t score_tile, int first) {
  constexpr int kChain = 16;
  const float* qv[kVecs];
#pragma GCC unroll 3
  for (int v = 0; v < kVecs; ++v) qv[v] = q + vec_offset(first + v, q_tile);
  for (int begin = 0; begin < dim; begin += kChain) {
    Vec acc[kBlockKeys][kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 8
      for (int x = 0; x < kBlockKeys; ++x) acc[x][v] = vset(0.0f);
    }
    for (int d = begin; d < least(begin + kChain, dim); ++d) {
      Vec query[kVecs];
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) query[v] = vload(qv[v] + d * kLanes);
#pragma GCC unroll 8
      for (int x = 0; x < kBlockKeys; ++x) {
        const Vec key = vset(k[x * dim + d]);
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) acc[x][v] = vfma(key, query[v], acc[x][v]);
      }
    }
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
      float* s = scores + vec_offset(first + v, score_tile);
#pragma GCC unroll 8
      for (int x = 0; x < kBlockKeys; ++x) {
        vstore(s + x * kLanes, begin == 0 ? acc[x][v] : vadd(vload(s + x * kLanes), acc[x][v]));
      }
    }
  }
}

// out[v][d] += sum over keys of p[v][key] * v[key][d], one chain of FMAs per element and chunk, for
// kBlockKeys columns d.
template <int kVecs>
TRANCHE_INLINE void value_block(const float* p, int64_t p_tile, const float* v, int dim, int keys, float* out,
                                int64_t out_tile, int first) {
  Vec acc[kBlockKeys][kVecs];
  const float* weight[kVecs];
#pragma GCC unroll 3
  for (int i = 0; i < kVecs; ++i) {
    weight[i] = p + vec_offset(first + i, p_tile);
#pragma GCC unroll 8
    for (int d = 0; d < kBlockKeys; ++d) acc[d][i] = vset(0.0f);
  }
  for (int x = 0; x < keys; ++x) {
    Vec w[kVecs];
#pragma GCC unroll 3
    for (int i = 0; i < kVecs; ++i) w[i] = vload(weight[i] + x * kLanes);
    const float* row = v + int64_t(x) * dim;
#pragma GCC unroll 8
    for (int d = 0; d < kBlockKeys; ++d) {
      const Vec value = vset(row[d]);
#pragma GCC unroll 3
      for (int i = 0; i < kVecs; ++i) acc[d][i] = vfma(w[i], value, acc[d][i]);
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < kVecs; ++i) {
    float* o = out + vec_offset(first + i, out_tile);
#pragma GCC unroll 8
    for (int d = 0; d < kBlockKeys; ++d) vstore(o + d * kLanes, vadd(vload(o + d * kLanes), acc[d][i]));
  }
}

// The same where some value is not finite and not every row may see it: invisible keys have p = -0.
static void value_block_masked(const float* p, const float* v, int dim, int keys, float* out) {
  for (int lane = 0; lane < kLanes; lane += kWidth) {
    for (int d = 0; d < dim; ++d) {
      Vec acc = vset(0.0f);
      for (int x = 0; x < keys; ++x) {
        const Vec w = vload(p + x * kLanes + lane);
        acc = vselect(mask_positive(w), vfma(w, vset(v[int64_t(x) * dim + d]), acc), acc);
      }
      float* o = out + d * kLanes + lane;
      vstore(o, vadd(vload(o), acc));
    }
  }
}

TRANCHE_INLINE bool any_nonfinite(const float* x, int64_t n) {
  uint32_t found = 0;
  for (int64_t i = 0; i < n; ++i) found |= uint32_t((float_bits(x[i]) & 0x7f800000u) == 0x7f800000u);
  return found != 0;
}

template <class Q, class KV>
class FmaKernel {
 public:
  using Query = Q;
  static constexpr int kElement = int(sizeof(KV));
  struct Session {};

  FmaKernel(const TreeAttentionParams& p, const Geometry& g) : p_(p), g_(g), dim_(g.padded_dim) {
    const int64_t keys = round_up(kChunk + p.nodes + 32, kBlockKeys);
    score_tile_ = keys * kLanes;
    keys_ = keys;
  }

  void take(Arena& arena) {
    q_ = arena.take<float>(int64_t(g_.block_tiles) * dim_ * kLanes);
    k_ = arena.take<float>(keys_ * dim_);
    v_ = arena.take<float>(keys_ * dim_);
    scores_ = arena.take<float>(kBlockVecs * score_tile_);
  }

  void begin(const Block& block) {
    const float factor = score_factor(p_, block.head_kv), sign = factor < 0.0f ? -1.0f : 1.0f;
    factor_ = factor * sign;
    memset(q_, 0, sizeof(float) * size_t(block.tiles) * dim_ * kLanes);
    for (int r = 0; r < block.rows; ++r) {
      const int row = block.first_row + r;
      const Q* from = static_cast<const Q*>(p_.q) + block.b * p_.q_stride[0] +
                      row / g_.group * p_.q_stride[1] +
                      (block.head_kv * g_.group + row % g_.group) * p_.q_stride[2];
      float* to = q_ + int64_t(r / kLanes) * dim_ * kLanes + r % kLanes;
      for (int d = 0; d < p_.head_dim; ++d) to[d * kLanes] = to_float(from[d]) * sign;
    }
  }

  void chunk(const Block& block, const Chunk& chunk, const Partial& result) {
    // Packed without gaps: prefix, then nodes.
    const int keys = chunk.prefix + chunk.nodes;
    Prefetch& prefetch = *chunk.prefetch;
    prefetch.expect(float(keys) * (2 * kConvertKey + float(block.tiles * kVecsPerTile * dim_) * kProduct));
    pack(chunk, chunk.k_row, k_);
    pack(chunk, chunk.v_row, v_);
    const int shared = chunk.uniform ? chunk.prefix : 0;
    const bool masked = any_nonfinite(v_ + int64_t(shared) * dim_, int64_t(keys - shared) * dim_);
    Chunk packed = chunk;
    packed.padded = chunk.prefix;

    const int vecs = block.tiles * kVecsPerTile;
    constexpr int kTilesAtOnce = kBlockVecs;  // scores_ holds as many; a vector block may straddle tiles
    for (int tile = 0; tile < block.tiles; tile += kTilesAtOnce) {
      const int tiles = least(block.tiles - tile, kTilesAtOnce);
      const int count = least(vecs - tile * kVecsPerTile, tiles * kVecsPerTile);
      const float* q = q_ + int64_t(tile) * dim_ * kLanes;
      for (int x = 0; x < keys; x += kBlockKeys) {
        prefetch.work(float(count * kBlockKeys * dim_) * kProduct / 2);
        for_vecs(count, [&](auto vecs_tag, int first) {
          score_block<decltype(vecs_tag)::value>(q, int64_t(dim_) * kLanes, k_ + int64_t(x) * dim_, dim_,
                                                 scores_ + x * kLanes, score_tile_, first);
        });
      }
      for (int t = 0; t < tiles; ++t) softmax(block, packed, tile + t, scores_ + t * score_tile_, result);
      float* out = result.out + int64_t(tile) * dim_ * kLanes;
      if (masked) {
        for (int t = 0; t < tiles; ++t) {
          value_block_masked(scores_ + t * score_tile_, v_, dim_, keys, out + int64_t(t) * dim_ * kLanes);
        }
        continue;
      }
      for (int d = 0; d < dim_; d += kBlockKeys) {
        prefetch.work(float(count * kBlockKeys * keys) * kProduct / 2);
        for_vecs(count, [&](auto vecs_tag, int first) {
          value_block<decltype(vecs_tag)::value>(scores_, score_tile_, v_ + d, dim_, keys, out + d * kLanes,
                                                 int64_t(dim_) * kLanes, first);
        });
      }
    }
  }

 private:
  template <int n>
  struct Count {
    static constexpr int value = n;
  };
  template <class F>
  TRANCHE_INLINE void for_vecs(int count, const F& f) {
    int v = 0;
    for (; v + 3 <= count; v += 3) f(Count<3>(), v);
    if (v + 2 == count) f(Count<2>(), v);
    if (v + 1 == count) f(Count<1>(), v);
  }

  void pack(const Chunk& chunk, const char* const* rows, float* to) const {
    const auto row = [&](const char* from, float* row_to) {
      row_to_float(reinterpret_cast<const KV*>(from), row_to, p_.head_dim);
      for (int d = p_.head_dim; d < dim_; ++d) row_to[d] = 0.0f;
      chunk.prefetch->work(kConvertKey);
    };
    for (int x = 0; x < chunk.prefix; ++x) row(rows[x], to + int64_t(x) * dim_);
    for (int x = 0; x < chunk.nodes; ++x) row(rows[chunk.padded + x], to + int64_t(chunk.prefix + x) * dim_);
  }

  // Scores to weights p in place, -0 where a row does not see the key; rescales the row's output and sum.
  void softmax(const Block& block, const Chunk& chunk, int tile, float* scores, const Partial& result) const {
    const float factor = apply_softcap(p_, factor_, scores, chunk.prefix + chunk.nodes);
    for (int lane = 0; lane < kLanes; lane += kWidth) {
      const int at = tile * kLanes + lane;
      const Vec top = visible_max(chunk, block, g_, tile, lane, scores);
      const Vec alpha = advance_max(result.max + at, top, factor);
      const Vec base = finite_max(vload(result.max + at)), scale = vset(factor), hidden = vset(-0.0f);
      Vec sum[2] = {vset(0.0f), vset(0.0f)};  // by the half of the group of 32 positions
      float* s = scores + lane;
      for (int x = 0; x < chunk.prefix; ++x) {
        Vec p = vexp2<6>(vfms(vload(s + x * kLanes), scale, base));
        if (!chunk.uniform) p = vselect(mask_above(int32_t(chunk.first + x), block.limit + at), p, hidden);
        vstore(s + x * kLanes, p);
        sum[x >> 4 & 1] = vadd(sum[x >> 4 & 1], p);
      }
      for (int x = 0; x < chunk.nodes; ++x) {
        const int j = chunk.node[x];
        float* at_key = s + (chunk.padded + x) * kLanes;
        Vec p = vexp2<6>(vfms(vload(at_key), scale, base));
        p = vselect(node_mask(block, g_, j, tile, lane), p, hidden);
        vstore(at_key, p);
        const int half = (block.seqlen + block.depth[j]) >> 4 & 1;
        sum[half] = vadd(sum[half], p);
      }
      vstore(result.sum + at, vfma(vload(result.sum + at), alpha, vadd(sum[0], sum[1])));
      if (vall(veq(alpha, vset(1.0f)))) continue;
      float* o = result.out + int64_t(tile) * dim_ * kLanes + lane;
      for (int d = 0; d < dim_; ++d) vstore(o + d * kLanes, vmul(vload(o + d * kLanes), alpha));
    }
  }

  const TreeAttentionParams& p_;
  const Geometry& g_;
  int dim_;
  int64_t keys_, score_tile_;
  float factor_ = 0.0f;
  float *q_ = nullptr, *k_ = nullptr, *v_ = nullptr, *scores_ = nullptr;
};

}  // namespace tranche::cpu::TRANCHE_ISA
