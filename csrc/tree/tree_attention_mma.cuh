// The arithmetic of tree_attention for float16 and bfloat16: mma.sync m16n8k16, 16 query rows to a warp.
//
// kRowWarps warps stand below one another and take 16 rows each. kColumnWarps stand side by side: each of
// them computes the same scores again, and its own columns of P V. So few rows (decoding) keep four warps
// busy with the same instructions in the same order as many rows do, and no scores cross shared memory.
//
// A tile's rows are 16-byte units, unit u of row r stored at u ^ (r % 8): the eight rows of an ldmatrix
// matrix then lie in different banks. Cells of e4m3 arrive as bytes and are widened into one further tile;
// e4m3 is a subset of both 16-bit types.
#pragma once

#include "tree/tree_attention_stream.cuh"

namespace tranche {

template <class T_, int kDim_, int kRowWarps_, int kColumnWarps_>
struct MmaTraits {
  using T = T_;
  static constexpr int kDim = kDim_;  // head size, rounded up
  static constexpr int kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kBlocksPerSm = kThreads <= 128 ? 2 : 1;
  static constexpr int kBlockRows = 16 * kRowWarps;
  static constexpr int kTile = kDim <= 64 ? 64 : 32;
  static constexpr int kStages = kDim <= 128 ? 4 : 3;
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kUnits = kRowBytes / 16;  // of a row
  static constexpr int kTileBytes = kTile * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // K, then V
  // A warp's queries stay in registers, unless they would take 64.
  static constexpr bool kQueriesInShared = kDim > 128;
  static constexpr int kFlagBytes = 16;  // which rows of the tile hold non-finite values, twice
  static constexpr int kScratchBytes = kFlagBytes + (kQueriesInShared ? kBlockRows * kRowBytes : 0);

  // Layout of State.
  static constexpr int kVectors = kDim / kColumnWarps / 8;
  static constexpr int kRows = 2;
  static constexpr bool kNatural = false;
  static constexpr bool kWideVectors = false;  // acc[v][0..1] and acc[v][2..3]: two columns of two rows
  static constexpr TRANCHE_HD int row_of(int, int e) { return e / 2; }

  static_assert(sizeof(T) == 2);
  static_assert(kDim == 64 || kDim == 128 || kDim == 256, "a row is a whole number of swizzle periods");
  static_assert(kVectors % 2 == 0, "ldmatrix brings two column groups");
  static_assert(kTile * kUnits % kThreads == 0, "every thread copies as many units");
  static_assert(kStages >= 3, "bytes use half the ring, the widened tile a third");
};

template <class T>
__device__ __forceinline__ bool finite_pair(uint32_t pair) {
  constexpr uint32_t kExponent = dtype_of<T>::value == DType::bf16 ? 0x7f80u : 0x7c00u;
  return (pair & kExponent) != kExponent && ((pair >> 16) & kExponent) != kExponent;
}

// The numbers of a pair that are not finite become zero.
template <class T>
__device__ __forceinline__ uint32_t keep_finite(uint32_t pair) {
  constexpr uint32_t kExponent = dtype_of<T>::value == DType::bf16 ? 0x7f80u : 0x7c00u;
  if ((pair & kExponent) == kExponent) pair &= 0xffff0000u;
  if (((pair >> 16) & kExponent) == kExponent) pair &= 0x0000ffffu;
  return pair;
}

template <class T>
__device__ __forceinline__ uint32_t widen_pair(uint32_t bytes) {
  float x[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t byte = (bytes >> (8 * i)) & 0xffu;
    // Exponent and mantissa moved into place, then the bias put right by a product, subnormals included.
    x[i] = ptx::mul(bits_float((byte & 0x7fu) << 20), 1.329227995784916e36f);  // 2^120
    x[i] = (byte & 0x7fu) == 0x7fu ? bits_float(0x7fc00000u)
                                   : bits_float(float_bits(x[i]) | (byte & 0x80u) << 24);
  }
  return ptx::pack<T>(x[0], x[1]);
}

template <class Traits_>
class MmaEngine {
 public:
  using Traits = Traits_;
  using T = typename Traits::T;
  State<Traits> chunk;

  __device__ __forceinline__ MmaEngine(const Block& block, unsigned char* scratch)
      : block_(block),
        map_(block.plan, block.h),
        warp_(uniform(int(threadIdx.x) / 32)),
        bad_rows_(reinterpret_cast<uint32_t*>(scratch)),
        query_tile_(Traits::kQueriesInShared ? scratch + Traits::kFlagBytes : dynamic_smem<unsigned char>()) {
    if (threadIdx.x < 4) bad_rows_[threadIdx.x] = 0;
    working_ = block.in_use(block.first_row + warp_row() * 16);
    load_queries();
  }

  __device__ __forceinline__ int row(int i) const {
    return block_.first_row + warp_row() * 16 + lane() / 4 + 8 * i;
  }
  __device__ __forceinline__ int column(int v) const { return first_column() + v * 8 + lane() % 4 * 2; }
  __device__ __forceinline__ bool writes_stats() const { return warp_column() == 0 && lane() % 4 == 0; }

  __device__ __forceinline__ void copy(unsigned char* stage, const int64_t* offsets) const {
    const TreeAttentionParams& p = block_.plan.p;
    if (p.kv_type == DType::e4m3) {
      unsigned char* bytes = byte_stage(stage);
      copy_units<1>(bytes, bytes + Traits::kTileBytes / 2, offsets);
    } else {
      copy_units<2>(stage, stage + Traits::kTileBytes, offsets);
    }
  }

  __device__ __forceinline__ void begin_chunk() {
    chunk.clear();
    sum_[0] = sum_[1] = 0.0f;
  }

  __device__ __forceinline__ void end_chunk() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float pair = sum_[i] + __shfl_xor_sync(0xffffffffu, sum_[i], 1);
      chunk.l[i] = pair + __shfl_xor_sync(0xffffffffu, pair, 2);
    }
  }

  // `full`: every row sees every key.
  __device__ __forceinline__ void tile(unsigned char* stage, int first, bool full) {
    unsigned char* keys = stage;
    unsigned char* values = stage + Traits::kTileBytes;
    if (block_.plan.p.kv_type == DType::e4m3) {
      unsigned char* bytes = byte_stage(stage);
      keys = dynamic_smem<unsigned char>() + (Traits::kStages - 1) * Traits::kStageBytes;
      values = keys + Traits::kTileBytes;
      widen(bytes, keys);  // and the values behind them: two tiles of bytes become two tiles
      __syncthreads();
    }
    const uint64_t bad = full ? 0 : clear_non_finite(values);
    if (!working_) return;

    float s[kScoreGroups][4];
    scores(keys, s);
    uint64_t mask[2] = {};
    if (full) {
      softmax<false>(s, mask);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        mask[i] = visible_keys(block_.plan, block_.keys, block_.row(ptx::opaque(row(i))), block_.b, first);
      softmax<true>(s, mask);
    }
    accumulate(values, s);
    if (bad != 0) add_non_finite(bad, mask, first);
  }

 private:
  static constexpr int kScoreGroups = Traits::kTile / 8;
  static constexpr int kSteps = Traits::kDim / 16;

  __device__ __forceinline__ static int lane() { return int(threadIdx.x) % 32; }
  __device__ __forceinline__ int warp_row() const { return warp_ % Traits::kRowWarps; }
  __device__ __forceinline__ int warp_column() const { return warp_ / Traits::kRowWarps; }
  __device__ __forceinline__ int first_column() const { return warp_column() * (Traits::kVectors * 8); }

  __device__ __forceinline__ static unsigned char* unit(unsigned char* tile, int row, int u) {
    return tile + row * Traits::kRowBytes + ((u ^ (row & 7)) * 16);
  }

  // Stages of bytes are half as large: all lie in the first half of the ring, the widened tile in its last
  // stage.
  __device__ __forceinline__ static unsigned char* byte_stage(unsigned char* stage) {
    unsigned char* ring = dynamic_smem<unsigned char>();
    return ring + (stage - ring) / 2;
  }

  // Row by row, 16 bytes at a time; into registers by way of the ring, which is still empty.
  __device__ __forceinline__ void load_queries() {
    const TreeAttentionParams& p = block_.plan.p;
    static_assert(Traits::kQueriesInShared ||
                  Traits::kBlockRows * Traits::kRowBytes <= Traits::kStages * Traits::kStageBytes);
#pragma unroll 1
    for (int i = int(threadIdx.x); i < Traits::kBlockRows * Traits::kUnits; i += Traits::kThreads) {
      const int packed = block_.first_row + i / Traits::kUnits, u = i % Traits::kUnits;
      uint4 x = {0, 0, 0, 0};
      if (block_.in_use(packed) && u * 8 < p.head_dim) {
        const int64_t head = int64_t(block_.h) * block_.plan.group + packed % block_.plan.group;
        const T* source = static_cast<const T*>(p.q) + block_.b * p.q_stride[0] +
                          packed / block_.plan.group * p.q_stride[1] + head * p.q_stride[2] + u * 8;
        if (block_.plan.aligned_q) {
          x = *reinterpret_cast<const uint4*>(source);
        } else {
          x = gather<2>(reinterpret_cast<const unsigned char*>(source), true);
        }
      }
      *reinterpret_cast<uint4*>(unit(query_tile_, i / Traits::kUnits, u)) = x;
    }
    __syncthreads();
    if constexpr (!Traits::kQueriesInShared) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_query(step, queries_[step]);
    }
  }

  // The A operand of a step: rows 0..7 and 8..15, columns 0..7, then the same of columns 8..15.
  __device__ __forceinline__ void load_query(int step, uint32_t (&a)[4]) const {
    const int own = ptx::opaque(lane());
    const int row = warp_row() * 16 + own / 8 % 2 * 8 + own % 8;
    ptx::ldmatrix_x4(a, unit(query_tile_, row, step * 2 + own / 16));
  }

  // kBytes: of an element. A unit is 16 bytes as stored in the cache.
  template <int kBytes>
  __device__ __forceinline__ void copy_units(unsigned char* keys, unsigned char* values,
                                             const int64_t* offsets) const {
    constexpr int kRowUnits = Traits::kDim * kBytes / 16;
    const TreeAttentionParams& p = block_.plan.p;
    const unsigned char* k_cache = static_cast<const unsigned char*>(p.k_cache);
    const unsigned char* v_cache = static_cast<const unsigned char*>(p.v_cache);
    const int used_units = p.head_dim * kBytes / 16;
    const int units = Traits::kTile * kRowUnits;
    if (block_.plan.aligned_kv) {
#pragma unroll 4
      for (int i = ptx::opaque(int(threadIdx.x)); i < units; i += Traits::kThreads) {
        const int row = i / kRowUnits, u = i % kRowUnits;
        const int64_t k = offsets[row * 2], v = offsets[row * 2 + 1];
        const bool valid = k >= 0 && u < used_units;
        unsigned char* to = kBytes == 2 ? unit(keys, row, u) : keys + i * 16;
        ptx::cp_async_16(to, valid ? k_cache + k * kBytes + u * 16 : k_cache, valid);
        ptx::cp_async_16(to + (values - keys), valid ? v_cache + v * kBytes + u * 16 : v_cache, valid);
      }
    } else {
#pragma unroll 1
      for (int i = ptx::opaque(int(threadIdx.x)); i < 2 * units; i += Traits::kThreads) {
        const bool is_value = i >= units;
        const int row = i % units / kRowUnits, u = i % kRowUnits;
        const int64_t offset = offsets[row * 2 + (is_value ? 1 : 0)];
        unsigned char* tile = is_value ? values : keys;
        *reinterpret_cast<uint4*>(kBytes == 2 ? unit(tile, row, u) : tile + i % units * 16) = gather<kBytes>(
            (is_value ? v_cache : k_cache) + offset * kBytes + u * 16, offset >= 0 && u < used_units);
      }
    }
  }

  // 16 bytes by elements, from memory that is aligned to no more.
  template <int kBytes>
  __device__ __forceinline__ static uint4 gather(const unsigned char* source, bool valid) {
    uint32_t words[4] = {};
    if (valid) {
#pragma unroll
      for (int i = 0; i < 16 / kBytes; ++i) {
        uint32_t element;
        if constexpr (kBytes == 2) {
          element = reinterpret_cast<const uint16_t*>(source)[i];
        } else {
          element = source[i];
        }
        words[i * kBytes / 4] |= element << (i * kBytes % 4 * 8);
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }

  __device__ __forceinline__ static void widen(const unsigned char* bytes, unsigned char* wide) {
    constexpr int kRowUnits = Traits::kDim / 16;
#pragma unroll 2
    for (int i = ptx::opaque(int(threadIdx.x)); i < 2 * Traits::kTile * kRowUnits; i += Traits::kThreads) {
      const uint4 x = *reinterpret_cast<const uint4*>(bytes + i * 16);
      const int row = i / kRowUnits, u = i % kRowUnits * 2;
      *reinterpret_cast<uint4*>(unit(wide, row, u)) = {widen_pair<T>(x.x), widen_pair<T>(x.x >> 16),
                                                       widen_pair<T>(x.y), widen_pair<T>(x.y >> 16)};
      *reinterpret_cast<uint4*>(unit(wide, row, u + 1)) = {widen_pair<T>(x.z), widen_pair<T>(x.z >> 16),
                                                           widen_pair<T>(x.w), widen_pair<T>(x.w >> 16)};
    }
  }

  // 0 * NaN is NaN in an MMA, and some rows do not see all values of this tile: what is not finite is taken
  // out of the tile. Returns the keys concerned, to every thread.
  __device__ __forceinline__ uint64_t clear_non_finite(unsigned char* values) {
    uint32_t* bad = bad_rows_ + 2 * parity_;
    for (int i = ptx::opaque(int(threadIdx.x)); i < Traits::kTile * Traits::kUnits; i += Traits::kThreads) {
      const int row = i / Traits::kUnits;
      uint4& x = *reinterpret_cast<uint4*>(values + i * 16);
      const uint4 y = x;
      if (finite_pair<T>(y.x) && finite_pair<T>(y.y) && finite_pair<T>(y.z) && finite_pair<T>(y.w)) continue;
      x = {keep_finite<T>(y.x), keep_finite<T>(y.y), keep_finite<T>(y.z), keep_finite<T>(y.w)};
      atomicOr(bad + row / 32, 1u << (row % 32));
    }
    __syncthreads();
    // The other pair was last read before this turn's first barrier.
    if (threadIdx.x < 2) bad_rows_[2 * (1 - parity_) + threadIdx.x] = 0;
    parity_ = 1 - parity_;
    return uint64_t(bad[1]) << 32 | bad[0];
  }

  // And added to the rows that do see it: NaN gives NaN, an infinity gives that infinity.
  __device__ __forceinline__ void add_non_finite(uint64_t bad, const uint64_t (&mask)[2], int first) {
    const TreeAttentionParams& p = block_.plan.p;
    for (; bad != 0; bad &= bad - 1) {
      const int c = __ffsll(static_cast<long long>(bad)) - 1;
      const int64_t offset = block_.offset(first + c, block_.page(first + c), p.v_stride);
      const bool sees[2] = {((mask[0] >> c) & 1) != 0, ((mask[1] >> c) & 1) != 0};
      const int own_column = ptx::opaque(column(0));
#pragma unroll
      for (int v = 0; v < Traits::kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (own_column + v * 8 >= p.head_dim) continue;
          const float x = p.kv_type == DType::e4m3
                              ? to_float(static_cast<const e4m3*>(p.v_cache)[offset + own_column + v * 8 + e])
                              : to_float(static_cast<const T*>(p.v_cache)[offset + own_column + v * 8 + e]);
          const bool finite = (float_bits(x) & 0x7f800000u) != 0x7f800000u;
          if (sees[0] && !finite) chunk.acc[v][e] += x;
          if (sees[1] && !finite) chunk.acc[v][e + 2] += x;
        }
      }
    }
  }

  __device__ __forceinline__ void scores(unsigned char* keys, float (&s)[kScoreGroups][4]) const {
#pragma unroll
    for (int j = 0; j < kScoreGroups; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = 0.0f;
    }
    const int own = ptx::opaque(lane());
    const int row = own / 16 * 8 + own % 8, half_unit = own / 8 % 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t q[4];
      if constexpr (Traits::kQueriesInShared) {
        load_query(step, q);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[i] = queries_[step][i];
      }
#pragma unroll
      for (int j = 0; j < kScoreGroups; j += 2) {
        uint32_t k[4];
        ptx::ldmatrix_x4(k, unit(keys, j * 8 + row, step * 2 + half_unit));
        ptx::mma_m16n8k16<T>(s[j], q, {k[0], k[1]});
        ptx::mma_m16n8k16<T>(s[j + 1], q, {k[2], k[3]});
      }
    }
  }

  // Scores to weights; the state is rescaled to the new maximum, which masked keys do not touch.
  template <bool kMasked>
  __device__ __forceinline__ void softmax(float (&s)[kScoreGroups][4], const uint64_t (&mask)[2]) {
    float top[2] = {chunk.m[0], chunk.m[1]};
#pragma unroll
    for (int j = 0; j < kScoreGroups; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = ptx::mul(s[j][e], map_.factor);
    }
    if (map_.bound > 0.0f) {
#pragma unroll
      for (int j = 0; j < kScoreGroups; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[j][e] = map_.cap(s[j][e]);
      }
    }
#pragma unroll
    for (int j = 0; j < kScoreGroups; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (kMasked) {
          if (((mask[e / 2] >> (j * 8 + lane() % 4 * 2 + e % 2)) & 1) == 0) s[j][e] = kMinusInfinity;
        }
        top[e / 2] = fmaxf(top[e / 2], s[j][e]);
      }
    }
    float base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 2));
      const float rescale = chunk.m[i] == top[i] ? 1.0f : ptx::exp2_approx(chunk.m[i] - top[i]);
      chunk.m[i] = top[i];
      base[i] = top[i] == kMinusInfinity ? 0.0f : top[i];
      sum_[i] = ptx::mul(sum_[i], rescale);
#pragma unroll
      for (int v = 0; v < Traits::kVectors; ++v) {
        chunk.acc[v][2 * i] = ptx::mul(chunk.acc[v][2 * i], rescale);
        chunk.acc[v][2 * i + 1] = ptx::mul(chunk.acc[v][2 * i + 1], rescale);
      }
    }
#pragma unroll
    for (int j = 0; j < kScoreGroups; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[j][e] = ptx::exp2_approx(s[j][e] - base[e / 2]);
        sum_[e / 2] += s[j][e];
      }
    }
  }

  // P V.
  __device__ __forceinline__ void accumulate(unsigned char* values, const float (&p)[kScoreGroups][4]) {
    const int own = ptx::opaque(lane());
    const int row = own / 8 % 2 * 8 + own % 8;
    const int first_unit = first_column() / 8 + own / 16;
#pragma unroll
    for (int group = 0; group < kScoreGroups / 2; ++group) {
      const float (&left)[4] = p[2 * group];
      const float (&right)[4] = p[2 * group + 1];
      const uint32_t weights[4] = {ptx::pack<T>(left[0], left[1]), ptx::pack<T>(left[2], left[3]),
                                   ptx::pack<T>(right[0], right[1]), ptx::pack<T>(right[2], right[3])};
#pragma unroll
      for (int v = 0; v < Traits::kVectors; v += 2) {
        uint32_t x[4];
        ptx::ldmatrix_x4_trans(x, unit(values, group * 16 + row, first_unit + v));
        ptx::mma_m16n8k16<T>(chunk.acc[v], weights, {x[0], x[1]});
        ptx::mma_m16n8k16<T>(chunk.acc[v + 1], weights, {x[2], x[3]});
      }
    }
  }

  const Block& block_;
  ScoreMap<false> map_;
  int warp_;
  uint32_t* bad_rows_;
  int parity_ = 0;
  bool working_;
  float sum_[2];  // of this lane's weights, in the order of its keys, before they are rounded
  unsigned char* query_tile_;
  uint32_t queries_[Traits::kQueriesInShared ? 1 : kSteps][4];
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    tree_attention_mma(const __grid_constant__ TreeAttentionLaunch plan) {
  attend_first<MmaEngine<Traits>>(plan);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    tree_attention_mma_paths(const __grid_constant__ TreeAttentionLaunch plan) {
  attend_paths<MmaEngine<Traits>>(plan);
}

}  // namespace tranche
