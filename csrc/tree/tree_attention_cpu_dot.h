// tree_attention for bf16 queries by AVX-512's dot product of bf16 pairs, vdpbf16ps.
//
// One instruction takes two terms of each lane's sum, as fma(low, fma(high, sum)): first the high halves of
// its 32-bit words, then the low ones, each rounded. A sum of any length is thus one chain of FMAs. Scores
// pair the elements of the head; P V pairs keys, the earlier one in the high half. A row's visible keys are
// then one chain in ascending position, to which the keys between them that it does not see add 0 times a
// finite value: nothing. So no row's path is gathered, and decoding it alone gives the same bits.
//
// Weights are rounded to bf16 in P V; their sum takes them unrounded. Keys of e4m3 become bf16 exactly.
#pragma once

#include "tree/tree_attention_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int kWords = 16;      // pairs in a vector
constexpr int kStripTiles = 3;  // row tiles worked on at a time

// Rough cycles, by which the next chunk's rows are fetched meanwhile: of packing a key or a value, and of one
// element of a head for a tile of rows in both products.
constexpr float kPackKey = 16.0f, kPairProduct = 0.5f;

TRANCHE_INLINE Vec vdot(Vec sum, __m512i x, __m512i y) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
}

// sums[v][x] += over i: shared[i][x] . rows[v][i], for kCount consecutive x and kVecs tiles of rows.
// `shared` is [pairs][16] words and each tile of `rows` too: one broadcast serves kVecs products.
template <int kCount, int kVecs>
TRANCHE_INLINE void dot_block(const uint32_t* shared, const uint32_t* rows, int64_t row_tile, int pairs,
                              Vec (&sums)[kCount][kVecs]) {
#pragma GCC unroll 16
  for (int x = 0; x < kCount; ++x) {
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) sums[x][v] = vset(0.0f);
  }
  for (int i = 0; i < pairs; ++i, shared += kWords, rows += kLanes) {
    __m512i row[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) row[v] = _mm512_load_si512(rows + v * row_tile);
#pragma GCC unroll 16
    for (int x = 0; x < kCount; ++x) {
      const __m512i both = _mm512_set1_epi32(int(shared[x]));
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) sums[x][v] = vdot(sums[x][v], both, row[v]);
    }
  }
}

template <class KV>
class DotKernel {
 public:
  using Query = bf16;
  static constexpr int kElement = int(sizeof(KV));
  struct Session {};

  DotKernel(const TreeAttentionParams& p, const Geometry& g)
      : p_(p),
        g_(g),
        dim_(p.head_dim),
        keys_(int(round_up(kChunk + p.nodes, kWords))),
        score_tile_(int64_t(keys_) * kLanes) {}

  void take(Arena& arena) {
    q_ = arena.take<uint32_t>(int64_t(g_.block_tiles) * q_tile());
    k_ = arena.take<uint32_t>(int64_t(keys_) * dim_ / 2);
    v_ = arena.take<uint32_t>(int64_t(keys_) * dim_ / 2);
    scores_ = arena.take<float>(kStripTiles * score_tile_);
    row_ = arena.take<const char*>(keys_);
    special_ = arena.take<int32_t>(keys_);
  }

  void begin(const Block& block) {
    const float factor = score_factor(p_, block.head_kv);
    factor_ = __builtin_fabsf(factor);
    for (int tile = 0; tile < block.tiles; ++tile) {
      const char* row[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int r = block.first_row + tile * kLanes + lane;
        row[lane] =
            tile * kLanes + lane >= block.rows
                ? nullptr
                : reinterpret_cast<const char*>(static_cast<const bf16*>(p_.q) + block.b * p_.q_stride[0] +
                                                r / g_.group * p_.q_stride[1] +
                                                (block.head_kv * g_.group + r % g_.group) * p_.q_stride[2]);
      }
      pack_transposed<bf16>(row, factor < 0.0f ? 0x80008000u : 0u, q_ + tile * q_tile());
    }
  }

  void chunk(const Block& block, const Chunk& given, const Partial& result) {
    // Packed without gaps: prefix, then nodes, then nothing up to a multiple of 16.
    const int keys = given.prefix + given.nodes;
    given.prefetch->expect(float(keys) * (2 * kPackKey + float(block.tiles * dim_) * kPairProduct));
    pack_keys(given, keys);
    pack_values(given, keys);
    Chunk chunk = given;
    chunk.padded = chunk.prefix;
    for (int tile = 0; tile < block.tiles; tile += kStripTiles) {
      const int tiles = least(block.tiles - tile, kStripTiles);
      if (tiles == 3) {
        strip<8, 3>(block, chunk, tile, result);
      } else if (tiles == 2) {
        strip<8, 2>(block, chunk, tile, result);
      } else {
        strip<16, 1>(block, chunk, tile, result);
      }
    }
  }

 private:
  int64_t q_tile() const { return int64_t(dim_) / 2 * kLanes; }

  // Elements d .. d + 31 of a row as bf16, of which `count` are read and the rest are 0.
  template <class T>
  TRANCHE_INLINE __m512i load32(const char* row, int d, int count) {
    if constexpr (__is_same(T, bf16)) {
      const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1u;
      return _mm512_maskz_loadu_epi16(mask, row + 2 * d);
    } else {
      const T* from = reinterpret_cast<const T*>(row) + d;
      const Vec low = load16(from, least(count, 16)), high = load16(from + 16, most(count - 16, 0));
      return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    }
  }

  // 16 rows to words [dim / 2][16 rows] of neighbouring elements; a null row is zeros.
  template <class T>
  void pack_transposed(const char* const* row, uint32_t flip, uint32_t* to) const {
    const __m512i sign = _mm512_set1_epi32(int(flip));
    for (int d = 0; d < dim_; d += 32) {
      const int count = least(dim_ - d, 32);
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        x[i] = row[i] ? _mm512_xor_si512(load32<T>(row[i], d, count), sign) : _mm512_setzero_si512();
      }
      transpose16(x);
      for (int i = 0; i < count / 2; ++i, to += kWords) _mm512_store_si512(to, x[i]);
    }
  }

  void gather_rows(const Chunk& chunk, const char* const* from, int keys) const {
    for (int x = 0; x < chunk.prefix; ++x) row_[x] = from[x];
    for (int x = 0; x < chunk.nodes; ++x) row_[chunk.prefix + x] = from[chunk.padded + x];
    for (int x = keys; x < int(round_up(keys, kWords)); ++x) row_[x] = nullptr;
  }

  // To [keys / 16][dim / 2][16 keys].
  void pack_keys(const Chunk& chunk, int keys) const {
    gather_rows(chunk, chunk.k_row, keys);
    for (int x = 0; x < keys; x += kWords) {
      pack_transposed<KV>(row_ + x, 0, k_ + int64_t(x) * dim_ / 2);
      chunk.prefetch->work(kWords * kPackKey);
    }
  }

  // To [dim / 16][pairs][16 columns]. NaN and infinity are left out and their keys listed: 0 times them is
  // not 0.
  void pack_values(const Chunk& chunk, int keys) {
    gather_rows(chunk, chunk.v_row, keys);
    specials_ = 0;
    const int pairs = (keys + 1) / 2;
    const __m512i high = _mm512_set1_epi32(0x7f800000), low = _mm512_set1_epi32(0x7f80);
    for (int i = 0; i < pairs; ++i) {
      const KV* first = reinterpret_cast<const KV*>(row_[2 * i]);
      const KV* second = reinterpret_cast<const KV*>(row_[2 * i + 1]);
      int bad_first = 0, bad_second = 0;
      for (int d = 0; d < dim_; d += kWords) {
        const __m512i x = _mm512_castps_si512(load16(first + d, 16));
        const __m512i y = second ? _mm512_castps_si512(load16(second + d, 16)) : _mm512_setzero_si512();
        __m512i words = _mm512_or_si512(x, _mm512_srli_epi32(y, 16));
        const Mask bad_x = _mm512_cmpeq_epi32_mask(_mm512_and_si512(words, high), high);
        const Mask bad_y = _mm512_cmpeq_epi32_mask(_mm512_and_si512(words, low), low);
        words = _mm512_mask_and_epi32(words, bad_x, words, _mm512_set1_epi32(0xffff));
        words = _mm512_mask_and_epi32(words, bad_y, words, _mm512_set1_epi32(int(0xffff0000u)));
        bad_first |= bad_x;
        bad_second |= bad_y;
        _mm512_store_si512(v_ + (int64_t(d) / kWords * pairs + i) * kWords, words);
      }
      chunk.prefetch->work(2 * kPackKey);
      if (bad_first) special_[specials_++] = 2 * i;
      if (bad_second) special_[specials_++] = 2 * i + 1;
    }
  }

  // Row tiles tile .. tile + kVecs - 1: scores of kCount keys at a time, weights, kCount columns of P V.
  template <int kCount, int kVecs>
  void strip(const Block& block, const Chunk& chunk, int tile, const Partial& result) const {
    const int keys = chunk.prefix + chunk.nodes, pairs = (keys + 1) / 2;
    const uint32_t* q = q_ + tile * q_tile();
    for (int x = 0; x < keys; x += kCount) {
      Vec sums[kCount][kVecs];
      chunk.prefetch->work(float(kCount * kVecs * dim_) * kPairProduct / 2);
      dot_block<kCount>(k_ + int64_t(x / kWords) * kWords * (dim_ / 2) + x % kWords, q, q_tile(), dim_ / 2,
                        sums);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) vstore(scores_ + v * score_tile_ + (x + i) * kLanes, sums[i][v]);
      }
    }
    for (int v = 0; v < kVecs; ++v) softmax(block, chunk, tile + v, scores_ + v * score_tile_, result);
    float* out = result.out + int64_t(tile) * dim_ * kLanes;
    const uint32_t* weights = reinterpret_cast<const uint32_t*>(scores_);
    for (int d = 0; d < dim_; d += kCount) {
      Vec sums[kCount][kVecs];
      chunk.prefetch->work(float(kCount * kVecs * keys) * kPairProduct / 2);
      dot_block<kCount>(v_ + int64_t(d / kWords) * kWords * pairs + d % kWords, weights, score_tile_, pairs,
                        sums);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) {
          float* o = out + (int64_t(v) * dim_ + d + i) * kLanes;
          vstore(o, vadd(vload(o), sums[i][v]));
        }
      }
    }
    for (int i = 0; i < specials_; ++i) {
      for (int v = 0; v < kVecs; ++v) {
        add_special(block, chunk, special_[i], tile + v, weights + v * score_tile_,
                    out + int64_t(v) * dim_ * kLanes);
      }
    }
  }

  // Rows of `tile` that see key x of the chunk.
  TRANCHE_INLINE Mask sees(const Block& block, const Chunk& chunk, const Geometry& g, int x, int tile) {
    if (x >= chunk.prefix) return node_mask(block, g, chunk.node[x - chunk.prefix], tile, 0);
    return chunk.uniform ? Mask(0xffff) : mask_above(int32_t(chunk.first + x), block.limit + tile * kLanes);
  }

  // Scores [key][16] to weights [pair of keys][16] in place, 0 where a row does not see the key; rescales the
  // rows' output and sum.
  void softmax(const Block& block, const Chunk& chunk, int tile, float* scores, const Partial& result) const {
    const int keys = chunk.prefix + chunk.nodes;
    const float factor = apply_softcap(p_, factor_, scores, keys);
    const int at = tile * kLanes;
    const Vec top = visible_max(chunk, block, g_, tile, 0, scores);
    const Vec alpha = advance_max(result.max + at, top, factor);
    const Vec base = finite_max(vload(result.max + at)), scale = vset(factor);
    const __m512i half_ulp = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(int(0xffff0000u));
    Vec sum[2] = {vset(0.0f), vset(0.0f)};  // by the half of the group of 32 positions
    const auto exponential = [&](int x) { return vexp2<4>(vfms(vload(scores + x * kLanes), scale, base)); };
    const auto store = [&](int x, Vec p0, Vec p1) {  // rounded to bf16; weights are not negative
      const __m512i w0 = _mm512_add_epi32(_mm512_castps_si512(p0), half_ulp);
      const __m512i w1 = _mm512_add_epi32(_mm512_castps_si512(p1), half_ulp);
      _mm512_store_si512(scores + x / 2 * kLanes,
                         _mm512_ternarylogic_epi32(w0, high, _mm512_srli_epi32(w1, 16), 0xea));
    };
    int x = 0;
    for (; chunk.uniform && x + 2 <= chunk.prefix; x += 2) {
      const Vec p0 = exponential(x), p1 = exponential(x + 1);
      Vec& total = sum[x >> 4 & 1];
      total = vadd(vadd(total, p0), p1);
      store(x, p0, p1);
    }
    const auto weight = [&](int i) {
      if (i >= keys) return vset(0.0f);
      const Vec p = _mm512_maskz_mov_ps(sees(block, chunk, g_, i, tile), exponential(i));
      const int64_t position =
          i < chunk.prefix ? i : int64_t(block.seqlen) + block.depth[chunk.node[i - chunk.prefix]];
      Vec& total = sum[position >> 4 & 1];
      total = vadd(total, p);
      return p;
    };
    for (; x < keys; x += 2) {
      const Vec p0 = weight(x), p1 = weight(x + 1);
      store(x, p0, p1);
    }
    vstore(result.sum + at, vfma(vload(result.sum + at), alpha, vadd(sum[0], sum[1])));
    if (vall(veq(alpha, vset(1.0f)))) return;
    float* o = result.out + int64_t(tile) * dim_ * kLanes;
    for (int d = 0; d < dim_; ++d) vstore(o + d * kLanes, vmul(vload(o + d * kLanes), alpha));
  }

  // What of a value is not finite goes to the rows that see it.
  void add_special(const Block& block, const Chunk& chunk, int x, int tile, const uint32_t* weights,
                   float* out) const {
    const Mask mask = sees(block, chunk, g_, x, tile);
    const __m512i pair = _mm512_load_si512(weights + x / 2 * kLanes);
    const Vec weight = _mm512_castsi512_ps(
        x % 2 ? _mm512_slli_epi32(pair, 16) : _mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000u))));
    for (int d = 0; d < dim_; ++d) {
      const float value = to_float(reinterpret_cast<const KV*>(row_[x])[d]);
      if (value - value == 0.0f) continue;
      const Vec o = vload(out + d * kLanes);
      vstore(out + d * kLanes, vselect(mask, vfma(weight, vset(value), o), o));
    }
  }

  const TreeAttentionParams& p_;
  const Geometry& g_;
  int dim_, keys_;
  int64_t score_tile_;
  float factor_ = 0.0f;
  uint32_t *q_ = nullptr, *k_ = nullptr, *v_ = nullptr;  // packed pairs of bf16
  float* scores_ = nullptr;                              // [3][keys_][16], later the weights
  const char** row_ = nullptr;                           // of the keys at hand; in the end the values'
  int32_t* special_ = nullptr;                           // keys whose values are not all finite
  int specials_ = 0;
};

}  // namespace tranche::cpu::TRANCHE_ISA
