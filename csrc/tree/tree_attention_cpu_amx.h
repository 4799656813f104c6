// tree_attention on AMX tiles.
//
// Scores are S^T = K Q^T (keys are the tile rows, so a key row goes in as it lies) and the output O^T = V^T
// P^T. Rows lie along the lanes of both results, which makes the softmax between them vertical and lets the
// weights of two keys, side by side as bf16, be the second operand as they are; V is transposed once per
// chunk.
//
// Types. A bf16 number is one part, fp16 is exactly the sum of two bf16 parts and fp32 of three; products of
// parts below the type's own rounding are left out. e4m3 is one part. Weights are rounded to as many parts as
// the query has. An infinite key (in fp32: above 3.39e38) that a row sees gives it NaN in fp16 and fp32,
// where parts cancel.
//
// Order. One tile product takes 32 keys: the hardware sums keys 0-15 and keys 16-31 (the even and odd
// elements) in one chain of FMAs each and adds their sum to the output. Positions of a group of 32 that lies
// in the committed prefix are the same keys for all rows. In the groups from cache_seqlens / 32 on each node
// has keys of its own: these go through the same product, once per node, with the node's path gathered by
// position and zeros elsewhere. So decoding the node later, alone, takes the same steps.
#pragma once

#include "core/amx.h"
#include "tree/tree_attention_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int kGroup = 32;  // keys in a tile product
constexpr int kChunkGroups = kChunk / kGroup;
constexpr int kStrip = 2;  // row tiles worked on at a time

// Rough cycles of the steps during which the next chunk is fetched; the tile products are not among them, as
// they need the line buffers themselves. Packing: per 16 keys or 32 values of 128 elements and part.
constexpr float kPackKeys = 300.0f, kPackValues = 700.0f, kSoftmax = 280.0f;

template <class T>
constexpr int kParts = 1;
template <>
constexpr int kParts<half> = 2;
template <>
constexpr int kParts<float> = 3;

// Two vectors to kCount vectors of bf16 pairs, x0 in the low halves, whose sums are x0 and x1 (to nearest,
// for the last part). kGuard: x may hold a NaN that rounding would carry into infinity's sign.
template <int kCount, bool kGuard>
TRANCHE_INLINE void split_pair(Vec x0, Vec x1, __m512i (&parts)[kCount]) {
  const __m512i half_ulp = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(int(0xffff0000u));
  if constexpr (kGuard) {
    const Vec nan = vset(__builtin_nanf(""));
    x0 = _mm512_mask_mov_ps(x0, _mm512_cmp_ps_mask(x0, x0, _CMP_UNORD_Q), nan);
    x1 = _mm512_mask_mov_ps(x1, _mm512_cmp_ps_mask(x1, x1, _CMP_UNORD_Q), nan);
  }
#pragma GCC unroll 3
  for (int i = 0; i < kCount; ++i) {
    const __m512i r0 = _mm512_add_epi32(_mm512_castps_si512(x0), half_ulp);
    const __m512i r1 = _mm512_add_epi32(_mm512_castps_si512(x1), half_ulp);
    parts[i] =
        _mm512_ternarylogic_epi32(r1, high, _mm512_srli_epi32(r0, 16), 0xea);  // (r1 & high) | r0 >> 16
    if (i + 1 < kCount) {
      x0 = vsub(x0, _mm512_castsi512_ps(_mm512_and_si512(r0, high)));
      x1 = vsub(x1, _mm512_castsi512_ps(_mm512_and_si512(r1, high)));
    }
  }
}

TRANCHE_INLINE bool row_nonfinite(const void* row, int n, DType type) {
  uint32_t found = 0;
  if (type == DType::e4m3) {
    const e4m3* x = static_cast<const e4m3*>(row);
    for (int i = 0; i < n; ++i) found |= uint32_t((x[i].bits & 0x7f) == 0x7f);
  } else if (type == DType::f32) {
    const float* x = static_cast<const float*>(row);
    for (int i = 0; i < n; ++i) found |= uint32_t((float_bits(x[i]) & 0x7f800000u) == 0x7f800000u);
  } else {
    const uint16_t *x = static_cast<const uint16_t*>(row), exponent = type == DType::f16 ? 0x7c00 : 0x7f80;
    for (int i = 0; i < n; ++i) found |= uint32_t((x[i] & exponent) == exponent);
  }
  return found != 0;
}

template <class Q, class KV>
class AmxKernel {
 public:
  using Query = Q;
  using Session = Tiles;
  static constexpr int kElement = int(sizeof(KV));

  AmxKernel(const TreeAttentionParams& p, const Geometry& g)
      : p_(p),
        g_(g),
        dim_(g.padded_dim),
        dim_blocks_((g.padded_dim + 31) / 32),
        dim_tiles_(g.padded_dim / 16),
        keys_(int(round_up(kChunk + p.nodes, kGroup) + kGroup)) {}

  void take(Arena& arena) {
    const int64_t dim_pairs = (dim_tiles_ + 1) / 2;
    q_ = arena.take<char>((g_.block_tiles + 1) / 2 * dim_blocks_ * kQBytes);
    k_ = arena.take<char>(keys_ / kGroup * dim_blocks_ * kKBytes);
    v_ = arena.take<char>(dim_pairs * kChunkGroups * kKBytes);
    weights_ = arena.take<char>(kChunkGroups * kQBytes);
    scores_ = arena.take<float>(kStrip * int64_t(keys_) * kLanes);
    v_path_ = arena.take<char>(dim_pairs * kKBytes);
    weights_path_ = arena.take<char>(kQ * kTileBytes);
    path_ = arena.take<int32_t>(p_.nodes);
    nonfinite_ = arena.take<bool>(keys_);
    finite_ = arena.take<KV>(int64_t(kGroup) * p_.head_dim);
  }

  void begin(const Block& block) {
    const float factor = score_factor(p_, block.head_kv);
    factor_ = __builtin_fabsf(factor);
    const Vec sign = vset(factor < 0.0f ? -1.0f : 1.0f);
    for (int tile = 0; tile < block.tiles; ++tile) {
      const Q* row[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int r = block.first_row + tile * kLanes + lane;
        row[lane] = tile * kLanes + lane >= block.rows
                        ? nullptr
                        : static_cast<const Q*>(p_.q) + block.b * p_.q_stride[0] +
                              r / g_.group * p_.q_stride[1] +
                              (block.head_kv * g_.group + r % g_.group) * p_.q_stride[2];
      }
      for (int db = 0; db < dim_blocks_; ++db) {
        __m512i x[2][16];
        load_transposed(row, db * 32, x[0], sign);
        load_transposed(row, db * 32 + 16, x[1], sign);
        char* to = q_ + (int64_t(tile / 2) * dim_blocks_ + db) * kQBytes + tile % 2 * kTileBytes;
        for (int t = 0; t < 16; ++t) {
          // The elements of a pair are neighbours where keys are copied, 16 apart where they are converted.
          const __m512i low = kCopied ? x[t / 8][t % 8 * 2] : x[0][t];
          const __m512i high = kCopied ? x[t / 8][t % 8 * 2 + 1] : x[1][t];
          __m512i part[kQ];
          split_pair<kQ, true>(_mm512_castsi512_ps(low), _mm512_castsi512_ps(high), part);
          for (int i = 0; i < kQ; ++i) _mm512_store_si512(to + i * 2 * kTileBytes + t * 64, part[i]);
        }
      }
    }
  }

  void chunk(const Block& block, const Chunk& chunk, const Partial& result) {
    const int key_tiles = int(round_up(chunk.padded + chunk.nodes, kGroup)) / 16;
    Prefetch& prefetch = *chunk.prefetch;
    const float per_part = float(kK * dim_) / 128.0f;
    prefetch.expect((16 * kPackKeys + 8 * kPackValues) * per_part + float(8 * block.tiles) * kSoftmax);
    for (int tile = 0; tile < key_tiles; ++tile) {
      pack_keys(chunk.k_row + tile * 16, tile);
      prefetch.work(kPackKeys * per_part);
    }

    int groups = chunk.prefix / kGroup;  // shared by all rows
    const int rows = chunk.padded + chunk.nodes;
    bool special = false;
    const bool scan_all = kK > 1 || !chunk.uniform;
    for (int x = scan_all ? 0 : groups * kGroup; x < rows; ++x) {
      nonfinite_[x] = chunk.v_row[x] && row_nonfinite(chunk.v_row[x], p_.head_dim, dtype_of<KV>::value);
      special |= nonfinite_[x] && x < chunk.prefix;
    }
    if (scan_all && special) groups = 0;
    for (int i = 0; i < groups; ++i) {
      pack_values(chunk.v_row + i * kGroup, v_ + i * kKBytes, kChunkGroups * kKBytes);
      prefetch.work(kPackValues * per_part);
    }
    for (int tile = 0; tile < block.tiles; tile += kStrip) {
      block.tiles - tile >= 2 ? strip<true>(block, chunk, groups, key_tiles, tile, result)
                              : strip<false>(block, chunk, groups, key_tiles, tile, result);
    }
  }

 private:
  static constexpr int kQ = kParts<Q>, kK = kParts<KV>;  // parts of queries and weights; of keys and values
  static constexpr bool kCopied = __is_same(KV, bf16);   // keys need no conversion
  static_assert(kQ >= kK);
  // Packed operands are in the order in which they are used: pairs of tiles, with the parts of a pair
  // together.
  static constexpr int64_t kQBytes = 2 * kQ * kTileBytes, kKBytes = 2 * kK * kTileBytes;

  // Elements d .. d + 15 of 16 rows as x[element][row]; a null row is zeros.
  template <class T>
  void load_transposed(const T* const* row, int d, __m512i (&x)[16], Vec sign) const {
    const int width = most(least(p_.head_dim - d, 16), 0);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      x[i] = row[i] ? _mm512_castps_si512(vmul(load16(row[i] + d, width), sign)) : _mm512_setzero_si512();
    }
    transpose16(x);
  }

  // 16 keys to rows of tiles. All loads come before all stores: loads that follow stores to the same offset
  // in another page wait for them.
  void pack_keys(const char* const* row, int tile) const {
    char* to = k_ + int64_t(tile / 2) * dim_blocks_ * kKBytes + tile % 2 * kTileBytes;
    for (int db = 0; db < dim_blocks_; ++db, to += kKBytes) {
      const int left = p_.head_dim - db * 32;
      if constexpr (kCopied) {
        const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1u;
        __m512i x[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          x[i] = row[i] ? _mm512_maskz_loadu_epi16(mask, row[i] + db * 64) : _mm512_setzero_si512();
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, x[i]);
      } else {
        const int low = least(left, 16), high = most(least(left - 16, 16), 0);
        for (int i = 0; i < 16; ++i) {
          __m512i part[kK];
          for (int j = 0; j < kK; ++j) part[j] = _mm512_setzero_si512();
          const KV* from = reinterpret_cast<const KV*>(row[i]) + db * 32;
          if (row[i]) split_pair<kK, true>(load16(from, low), load16(from + 16, high), part);
          for (int j = 0; j < kK; ++j) _mm512_store_si512(to + j * 2 * kTileBytes + i * 64, part[j]);
        }
      }
    }
  }

  // 32 values to tiles [16 columns d][keys (t, t + 16) for t < 16]; `stride` leads from a pair of tiles to
  // the next.
  void pack_values(const char* const* row, char* to, int64_t stride) const {
    bool empty[2] = {true, true};
    for (int i = 0; i < kGroup; ++i) empty[i / 16] &= row[i] == nullptr;
    if constexpr (kCopied) {
      const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
      for (int d = 0; d < dim_; d += 32, to += stride) {
        const int left = p_.head_dim - d;
        const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1u;
        __m512i x[2][16];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) x[half][i] = _mm512_setzero_si512();
          if (empty[half]) continue;
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) {
            const char* from = row[half * 16 + i];
            if (from) x[half][i] = _mm512_maskz_loadu_epi16(mask, from + d * 2);
          }
          transpose16(x[half]);
        }
        // x[half][i] holds columns d + 2i and d + 2i + 1.
        const int pairs = least(dim_ - d, 32) / 2;
        for (int i = 0; i < pairs; ++i) {
          const __m512i even = _mm512_mask_blend_epi16(0xaaaaaaaau, x[0][i], _mm512_slli_epi32(x[1][i], 16));
          const __m512i odd = _mm512_ternarylogic_epi32(x[1][i], high, _mm512_srli_epi32(x[0][i], 16), 0xea);
          _mm512_store_si512(to + i * 128, even);
          _mm512_store_si512(to + i * 128 + 64, odd);
        }
      }
    } else {
      const KV* const* values = reinterpret_cast<const KV* const*>(row);
      for (int d = 0; d < dim_; d += 16) {
        char* tile = to + d / 32 * stride + d / 16 % 2 * kTileBytes;
        __m512i x[2][16];
        for (int half = 0; half < 2; ++half) {
          for (int i = 0; i < 16; ++i) x[half][i] = _mm512_setzero_si512();
          if (!empty[half]) load_transposed(values + half * 16, d, x[half], vset(1.0f));
        }
        for (int i = 0; i < 16; ++i) {
          __m512i part[kK];
          split_pair<kK, true>(_mm512_castsi512_ps(x[0][i]), _mm512_castsi512_ps(x[1][i]), part);
          for (int j = 0; j < kK; ++j) _mm512_store_si512(tile + j * 2 * kTileBytes + i * 64, part[j]);
        }
      }
    }
  }

  // Tile registers: 0-3 are the results of two tiles of K or V (in 4 and 7) with two row tiles (5 and 6).
  // Each tile loaded serves two products, so that the loads are not the limit.

  // Scores of key tiles k, k + 1 with row tiles tile, tile + 1 (if kTwo).
  template <bool kTwo>
  void score(int tile, int k) const {
    tile_zero<0>();
    tile_zero<2>();
    if (kTwo) {
      tile_zero<1>();
      tile_zero<3>();
    }
    const char* q = q_ + int64_t(tile / 2) * dim_blocks_ * kQBytes;
    const char* key = k_ + int64_t(k / 2) * dim_blocks_ * kKBytes;
    // Small products first: added while the sum is small, they cost no rounding of the sum.
    if constexpr (kQ > 1) {
      for (int db = 0; db < dim_blocks_; ++db) products<kTwo, kSmall>(key + db * kKBytes, q + db * kQBytes);
      for (int db = 0; db < dim_blocks_; ++db) products<kTwo, kLeading>(key + db * kKBytes, q + db * kQBytes);
    } else {
      for (int db = 0; db < dim_blocks_; ++db) products<kTwo, kAll>(key + db * kKBytes, q + db * kQBytes);
    }
    float *to = scores_ + k * 16 * kLanes, *next = to + int64_t(keys_) * kLanes;
    tile_store<0>(to, 64);
    tile_store<2>(to + 16 * kLanes, 64);
    if (kTwo) {
      tile_store<1>(next, 64);
      tile_store<3>(next + 16 * kLanes, 64);
    }
  }

  // Adds the shared groups to column tiles d, d + 1 (if there is one) of the output of one or two row tiles.
  template <bool kTwo>
  void accumulate(int groups, int d, float* out) const {
    float *out0 = out + int64_t(d) * 16 * kLanes, *out1 = out0 + int64_t(dim_) * kLanes;
    const bool second = d + 1 < dim_tiles_;
    tile_load<0>(out0, 64);
    if (kTwo) tile_load<1>(out1, 64);
    if (second) tile_load<2>(out0 + 16 * kLanes, 64);
    if (kTwo && second) tile_load<3>(out1 + 16 * kLanes, 64);
    const char *value = v_ + d / 2 * kChunkGroups * kKBytes, *weight = weights_;
    for (int g = 0; g < groups; ++g, value += kKBytes, weight += kQBytes) products<kTwo, kAll>(value, weight);
    tile_store<0>(out0, 64);
    if (kTwo) tile_store<1>(out1, 64);
    if (second) tile_store<2>(out0 + 16 * kLanes, 64);
    if (kTwo && second) tile_store<3>(out1 + 16 * kLanes, 64);
  }

  // Products of small parts come first, so that the others are what the sum is rounded with.
  //
  // Results 0 and 2 += the pair of tiles at `shared` times the first tile at `rows`; 1 and 3 with the second.
  // The next pair is asked for meanwhile: tile loads do not run far enough ahead to hide the second-level
  // cache.
  enum Products { kAll, kLeading, kSmall };  // of parts: all, that of the first parts, the others
  template <bool kTwo, Products kWhich>
  TRANCHE_INLINE void products(const char* shared, const char* rows) {
#pragma GCC unroll 3
    for (int j = kK - 1; j >= 0; --j) {
      if (kWhich == kLeading && j > 0) continue;
      const char* pair = shared + j * 2 * kTileBytes;
      tile_load<4>(pair, 64);
      tile_load<7>(pair + kTileBytes, 64);
#pragma GCC unroll 32
      for (int i = 0; i < 32; ++i) __builtin_prefetch(pair + kKBytes + i * 64, 0, 3);
#pragma GCC unroll 3
      for (int i = kQ - 1; i >= 0; --i) {
        if (i + j >= kQ || (kWhich == kLeading && i > 0) || (kWhich == kSmall && i + j == 0)) continue;
        const char* row = rows + i * 2 * kTileBytes;
        tile_load<5>(row, 64);
        tile_dot_bf16<0, 4, 5>();
        tile_dot_bf16<2, 7, 5>();
        if (kTwo) {
          tile_load<6>(row + kTileBytes, 64);
          tile_dot_bf16<1, 4, 6>();
          tile_dot_bf16<3, 7, 6>();
        }
      }
    }
  }

  template <bool kTwo>
  void strip(const Block& block, const Chunk& chunk, int groups, int key_tiles, int tile,
             const Partial& result) {
    constexpr int kTiles = kTwo ? 2 : 1;
    for (int k = 0; k < key_tiles; k += 2) score<kTwo>(tile, k);
    for (int t = 0; t < kTiles; ++t) softmax(block, chunk, groups, tile + t, t, result);
    float* out = result.out + int64_t(tile) * dim_ * kLanes;
    for (int d = 0; groups > 0 && d < dim_tiles_; d += 2) accumulate<kTwo>(groups, d, out);
    if (chunk.nodes == 0 && groups * kGroup >= chunk.prefix) return;
    for (int t = 0; t < kTiles; ++t) {
      own_groups(block, chunk, groups, tile + t, scores_ + int64_t(t) * keys_ * kLanes,
                 out + int64_t(t) * dim_ * kLanes);
    }
  }

  // Scores of row tile `tile` (the `which`-th of the strip at hand) to weights: the shared groups' as parts
  // in weights_, the other keys' as floats in place, 0 where a row does not see the key. Rescales output and
  // sum.
  void softmax(const Block& block, const Chunk& chunk, int groups, int tile, int which,
               const Partial& result) const {
    constexpr int kDegree = kQ == 3 ? 6 : 4;
    float* s = scores_ + int64_t(which) * keys_ * kLanes;
    const float factor = apply_softcap(p_, factor_, s, chunk.padded + chunk.nodes);
    const int at = tile * kLanes;
    const Vec top = visible_max(chunk, block, g_, tile, 0, s);
    const Vec alpha = advance_max(result.max + at, top, factor);
    const Vec base = finite_max(vload(result.max + at)), scale = vset(factor);
    const int32_t* limit = block.limit + at;
    Vec sum0 = vset(0.0f), sum1 = vset(0.0f);  // by the half of the group

    char* weights = weights_ + which * kTileBytes;
    const auto shared = [&](auto uniform) {
      for (int g = 0; g < groups; ++g) {
        chunk.prefetch->work(kSoftmax);
        const float* from = s + g * kGroup * kLanes;
#pragma GCC unroll 2
        for (int t = 0; t < 16; ++t) {
          Vec p0 = vexp2<kDegree>(vfms(vload(from + t * kLanes), scale, base));
          Vec p1 = vexp2<kDegree>(vfms(vload(from + (t + 16) * kLanes), scale, base));
          if constexpr (!decltype(uniform)::value) {
            const int32_t position = int32_t(chunk.first + g * kGroup + t);
            p0 = _mm512_maskz_mov_ps(mask_above(position, limit), p0);
            p1 = _mm512_maskz_mov_ps(mask_above(position + 16, limit), p1);
          }
          sum0 = vadd(sum0, p0);
          sum1 = vadd(sum1, p1);
          __m512i part[kQ];
          split_pair<kQ, false>(p0, p1, part);
#pragma GCC unroll 3
          for (int i = 0; i < kQ; ++i) {
            _mm512_store_si512(weights + g * kQBytes + i * 2 * kTileBytes + t * 64, part[i]);
          }
        }
      }
    };
    chunk.uniform ? shared(Flag<true>()) : shared(Flag<false>());

    const auto own = [&](int row, int64_t position, Mask mask) {
      float* at_key = s + row * kLanes;
      const Vec p = _mm512_maskz_mov_ps(mask, vexp2<kDegree>(vfms(vload(at_key), scale, base)));
      vstore(at_key, p);
      (position >> 4 & 1 ? sum1 : sum0) = vadd(position >> 4 & 1 ? sum1 : sum0, p);
    };
    for (int x = groups * kGroup; x < chunk.prefix; ++x) {
      own(x, x, chunk.uniform ? Mask(0xffff) : mask_above(int32_t(chunk.first + x), limit));
    }
    for (int x = 0; x < chunk.nodes; ++x) {
      const int j = chunk.node[x];
      own(chunk.padded + x, int64_t(block.seqlen) + block.depth[j], node_mask(block, g_, j, tile, 0));
    }
    vstore(result.sum + at, vfma(vload(result.sum + at), alpha, vadd(sum0, sum1)));
    if (vall(veq(alpha, vset(1.0f)))) return;
    float* o = result.out + int64_t(tile) * dim_ * kLanes;
    for (int d = 0; d < dim_; ++d) vstore(o + d * kLanes, vmul(vload(o + d * kLanes), alpha));
  }

  // Adds the groups of positions that are not shared, node by node.
  void own_groups(const Block& block, const Chunk& chunk, int groups, int tile, const float* weights,
                  float* out) {
    const int row0 = block.first_row + tile * kLanes;
    const int row_end = block.first_row + least((tile + 1) * kLanes, block.rows);
    for (int i = row0 / g_.group; i <= (row_end - 1) / g_.group; ++i) {
      const int begin = most(i * g_.group - row0, 0), end = least((i + 1) * g_.group, row_end) - row0;
      const Mask lanes = Mask((1u << end) - (1u << begin));
      const int depth = block.depth[i];
      const int64_t position = int64_t(block.seqlen) + depth;
      for (int d = 0; d <= depth; ++d) path_[d] = -1;
      for_each_ancestor(p_, block.b, i, [&](int j) {
        if (block.depth[j] <= depth && in_window(p_, block.depth[j], depth)) path_[block.depth[j]] = j;
      });
      const int64_t chunk_end = least<int64_t>(chunk.first + kChunk, position + 1);
      for (int64_t first = chunk.first + groups * kGroup; first < chunk_end; first += kGroup) {
        const char* v_row[kGroup];
        int weight_row[kGroup];
        bool any = false, guard = false;
        for (int x = 0; x < kGroup; ++x) {
          const int64_t key = first + x;
          int at = -1;
          if (key < block.seqlen) {
            if (in_window(p_, key, position)) at = int(key - chunk.first);
          } else if (key <= position && path_[key - block.seqlen] >= 0) {
            at = chunk.padded + block.index[path_[key - block.seqlen]];
          }
          weight_row[x] = at;
          v_row[x] = at < 0 ? nullptr : chunk.v_row[at];
          any |= at >= 0;
          guard |= at >= 0 && nonfinite_[at];
        }
        if (!any) continue;
        // Infinity or NaN would reach the other nodes, whose weights are 0, and an infinity's parts cancel:
        // such elements are taken out of the product and added on their own.
        const char* stored[kGroup];
        for (int x = 0; guard && x < kGroup; ++x) {
          stored[x] = v_row[x];
          if (weight_row[x] >= 0 && nonfinite_[weight_row[x]]) v_row[x] = finite_copy(v_row[x], x);
        }
        own_group(v_row, weight_row, lanes, weights, out);
        for (int x = 0; guard && x < kGroup; ++x) {
          if (v_row[x] == stored[x]) continue;
          const Vec weight = vload(weights + weight_row[x] * kLanes);
          for (int d = 0; d < p_.head_dim; ++d) {
            const float value = to_float(reinterpret_cast<const KV*>(stored[x])[d]);
            if (value - value == 0.0f) continue;
            const Vec o = vload(out + d * kLanes);
            vstore(out + d * kLanes, vselect(lanes, vfma(weight, vset(value), o), o));
          }
        }
      }
    }
  }

  // The row with 0 in place of what is not finite.
  const char* finite_copy(const char* row, int x) const {
    KV* copy = finite_ + int64_t(x) * p_.head_dim;
    for (int d = 0; d < p_.head_dim; ++d) {
      const KV element = reinterpret_cast<const KV*>(row)[d];
      const float value = to_float(element);
      copy[d] = value - value == 0.0f ? element : KV{};
    }
    return reinterpret_cast<const char*>(copy);
  }

  void own_group(const char* const* v_row, const int* weight_row, Mask lanes, const float* weights,
                 float* out) const {
    pack_values(v_row, v_path_, kKBytes);
    for (int t = 0; t < 16; ++t) {
      const auto weight = [&](int row) {
        return row < 0 ? vset(0.0f) : _mm512_maskz_loadu_ps(lanes, weights + row * kLanes);
      };
      __m512i part[kQ];
      split_pair<kQ, false>(weight(weight_row[t]), weight(weight_row[t + 16]), part);
      for (int i = 0; i < kQ; ++i) _mm512_store_si512(weights_path_ + i * kTileBytes + t * 64, part[i]);
    }
    tile_load<5>(weights_path_, 64);
    if (kQ > 1) tile_load<6>(weights_path_ + kTileBytes, 64);
    if (kQ > 2) tile_load<7>(weights_path_ + 2 * kTileBytes, 64);
    for (int d = 0; d < dim_tiles_; ++d) {
      float* to = out + int64_t(d) * 16 * kLanes;
      tile_load<0>(to, 64);
#pragma GCC unroll 3
      for (int j = kK - 1; j >= 0; --j) {  // small products first
        tile_load<4>(v_path_ + d / 2 * kKBytes + (j * 2 + d % 2) * kTileBytes, 64);
        if (2 + j < kQ) tile_dot_bf16<0, 4, 7>();
        if (1 + j < kQ) tile_dot_bf16<0, 4, 6>();
        tile_dot_bf16<0, 4, 5>();
      }
      tile_store<0>(to, 64);
    }
  }

  template <bool value_>
  struct Flag {
    static constexpr bool value = value_;
  };

  const TreeAttentionParams& p_;
  const Geometry& g_;
  int dim_, dim_blocks_, dim_tiles_, keys_;
  float factor_ = 0.0f;
  char *q_ = nullptr, *k_ = nullptr, *v_ = nullptr, *weights_ = nullptr;  // packed, by part
  float* scores_ = nullptr;                                               // [2][keys_][16]
  char *v_path_ = nullptr, *weights_path_ = nullptr;
  int32_t* path_ = nullptr;    // node of the path at each depth
  bool* nonfinite_ = nullptr;  // of the keys that are not shared: whether the value has NaN or infinity
  KV* finite_ = nullptr;       // rows without what is not finite
};

}  // namespace tranche::cpu::TRANCHE_ISA
