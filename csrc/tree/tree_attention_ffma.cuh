// The arithmetic of tree_attention for float32: plain fused multiply-adds, since TF32 would round the inputs
// to 11 bits. Every score is four chains over the head size (d mod 4), every output one chain over the keys
// of a chunk.
//
// 16 threads share a row: thread c of them has keys c, c + 16, ... of the tile, and columns 4c..4c+3 of
// every 64. So a row's maximum is a matter of 16 lanes, and its weights cross shared memory within half a
// warp.
#pragma once

#include "tree/tree_attention_stream.cuh"

namespace tranche {

template <int kDim_, int kThreadRows_>
struct FfmaTraits {
  using T = float;
  static constexpr int kDim = kDim_;  // head size, rounded up
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kRowThreads = 16;
  static constexpr int kThreadRows = kThreadRows_;
  static constexpr int kBlockRows = kThreads / kRowThreads * kThreadRows;
  static constexpr int kTile = kDim <= 128 ? 32 : 16;
  static constexpr int kKeys = kTile / kRowThreads;  // of a thread
  static constexpr int kStages = 3;
  static constexpr int kRowFloats = kDim + 4;  // 16 bytes on: 8 threads reading 8 rows meet 8 groups of banks
  static constexpr int kTileBytes = kTile * kRowFloats * 4;
  static constexpr int kStageBytes = 2 * kTileBytes;  // K, then V
  static constexpr int kWeightFloats = kTile + 4;
  static constexpr int kScratchBytes = kBlockRows * (kRowFloats + kWeightFloats) * 4;  // q, weights

  // Layout of State: acc[r * kColumns + c] is columns 64 c + 4 (thread % 16).. of the thread's row r.
  static constexpr int kColumns = kDim / (4 * kRowThreads);
  static constexpr int kVectors = kThreadRows * kColumns;
  static constexpr int kRows = kThreadRows;
  static constexpr bool kWideVectors = true;
  static constexpr bool kNatural = true;
  static constexpr TRANCHE_HD int row_of(int v, int) { return v / kColumns; }

  static_assert(kDim % 64 == 0 && kTile % kRowThreads == 0 && kRows % 2 == 0);
};

template <class Traits_>
class FfmaEngine {
 public:
  using Traits = Traits_;
  State<Traits> chunk;

  __device__ __forceinline__ FfmaEngine(const Block& block, unsigned char* scratch)
      : block_(block),
        map_(block.plan, block.h),
        queries_(reinterpret_cast<float*>(scratch)),
        weights_(queries_ + Traits::kBlockRows * Traits::kRowFloats) {
    const TreeAttentionParams& p = block.plan.p;
    // Read after the barriers that stand before the first tile.
    for (int i = int(threadIdx.x); i < Traits::kBlockRows * p.head_dim; i += Traits::kThreads) {
      const int r = i / p.head_dim, d = i % p.head_dim, packed = block.first_row + r;
      float x = 0.0f;
      if (block.in_use(packed)) {
        const int64_t head = int64_t(block.h) * block.plan.group + packed % block.plan.group;
        x = static_cast<const float*>(
            p.q)[block.b * p.q_stride[0] + packed / block.plan.group * p.q_stride[1] + head * p.q_stride[2] +
                 d];
      }
      queries_[r * Traits::kRowFloats + d] = x;
    }
  }

  __device__ __forceinline__ int row(int i) const { return block_.first_row + local_row(i); }
  __device__ __forceinline__ int column(int v) const {
    return v % Traits::kColumns * (4 * Traits::kRowThreads) + part() * 4;
  }
  __device__ __forceinline__ bool writes_stats() const { return part() == 0; }

  __device__ __forceinline__ void copy(unsigned char* stage, const int64_t* offsets) const {
    const TreeAttentionParams& p = block_.plan.p;
    if (p.kv_type == DType::e4m3) {
      copy_converted(reinterpret_cast<float*>(stage), static_cast<const e4m3*>(p.k_cache),
                     static_cast<const e4m3*>(p.v_cache), offsets);
    } else if (!block_.plan.aligned_kv) {
      copy_converted(reinterpret_cast<float*>(stage), static_cast<const float*>(p.k_cache),
                     static_cast<const float*>(p.v_cache), offsets);
    } else {
      const float* k_cache = static_cast<const float*>(p.k_cache);
      const float* v_cache = static_cast<const float*>(p.v_cache);
      constexpr int kUnits = Traits::kDim / 4;
#pragma unroll 4
      for (int i = int(threadIdx.x); i < Traits::kTile * kUnits; i += Traits::kThreads) {
        const int r = i / kUnits, d = i % kUnits * 4;
        const int64_t k = offsets[r * 2], v = offsets[r * 2 + 1];
        const bool valid = k >= 0 && d < p.head_dim;
        float* to = reinterpret_cast<float*>(stage) + r * Traits::kRowFloats + d;
        ptx::cp_async_16(to, valid ? k_cache + k + d : k_cache, valid);
        ptx::cp_async_16(to + Traits::kTileBytes / 4, valid ? v_cache + v + d : v_cache, valid);
      }
    }
  }

  __device__ __forceinline__ void begin_chunk() { chunk.clear(); }
  __device__ __forceinline__ void end_chunk() {}

  __device__ __forceinline__ void tile(unsigned char* stage, int first, bool full) {
    const float* keys = reinterpret_cast<const float*>(stage);
    const float* values = keys + Traits::kTileBytes / 4;
    uint64_t mask[Traits::kRows];
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      mask[r] =
          full ? ~uint64_t(0) : visible_keys(block_.plan, block_.keys, block_.row(row(r)), block_.b, first);
    }
    weigh(keys, mask);
    __syncwarp();
    if (full) {
      accumulate<false>(values, mask);
    } else {
      accumulate<true>(values, mask);
    }
    __syncwarp();  // the weights are overwritten in the next tile
  }

 private:
  __device__ __forceinline__ static int part() { return int(threadIdx.x) % Traits::kRowThreads; }
  __device__ __forceinline__ static int local_row(int i) {
    return int(threadIdx.x) / Traits::kRowThreads * Traits::kThreadRows + i;
  }

  template <class Cell>
  __device__ __forceinline__ void copy_converted(float* stage, const Cell* k_cache, const Cell* v_cache,
                                                 const int64_t* offsets) const {
    for (int i = int(threadIdx.x); i < Traits::kTile * Traits::kDim; i += Traits::kThreads) {
      const int r = i / Traits::kDim, d = i % Traits::kDim;
      const bool valid = offsets[r * 2] >= 0 && d < block_.plan.p.head_dim;
      float* to = stage + r * Traits::kRowFloats + d;
      to[0] = valid ? to_float(k_cache[offsets[r * 2] + d]) : 0.0f;
      to[Traits::kTileBytes / 4] = valid ? to_float(v_cache[offsets[r * 2 + 1] + d]) : 0.0f;
    }
  }

  __device__ __forceinline__ void weigh(const float* keys, const uint64_t (&mask)[Traits::kRows]) {
    float sums[Traits::kRows][Traits::kKeys][4] = {};
    const float* queries = queries_ + local_row(0) * Traits::kRowFloats;
#pragma unroll 4
    for (int d = 0; d < block_.plan.p.head_dim; d += 4) {
      Float4 q[Traits::kRows];
#pragma unroll
      for (int r = 0; r < Traits::kRows; ++r) {
        q[r] = *reinterpret_cast<const Float4*>(queries + r * Traits::kRowFloats + d);
      }
#pragma unroll
      for (int j = 0; j < Traits::kKeys; ++j) {
        const Float4 k = *reinterpret_cast<const Float4*>(
            keys + (part() + j * Traits::kRowThreads) * Traits::kRowFloats + d);
#pragma unroll
        for (int r = 0; r < Traits::kRows; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[r][j][e] = fmaf(q[r].v[e], k.v[e], sums[r][j][e]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r) {
      float s[Traits::kKeys];
      float top = chunk.m[r];
#pragma unroll
      for (int j = 0; j < Traits::kKeys; ++j) {
        const float (&sum)[4] = sums[r][j];
        float x = ptx::mul((sum[0] + sum[1]) + (sum[2] + sum[3]), map_.factor);
        if (map_.bound > 0.0f) x = map_.cap(x);
        x = (mask[r] >> (part() + j * Traits::kRowThreads)) & 1 ? x : kMinusInfinity;
        s[j] = x;
        top = fmaxf(top, x);
      }
#pragma unroll
      for (int lanes = 1; lanes < Traits::kRowThreads; lanes *= 2) {
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, lanes));
      }
      const float rescale = chunk.m[r] == top ? 1.0f : weight_of<true>(chunk.m[r] - top);
      const float base = top == kMinusInfinity ? 0.0f : top;
      chunk.m[r] = top;
      chunk.l[r] = ptx::mul(chunk.l[r], rescale);
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = chunk.acc[r * Traits::kColumns + c][e];
          x = ptx::mul(x, rescale);
        }
      }
#pragma unroll
      for (int j = 0; j < Traits::kKeys; ++j) {
        weights_[local_row(r) * Traits::kWeightFloats + part() + j * Traits::kRowThreads] =
            weight_of<true>(s[j] - base);
      }
    }
  }

  template <bool kMasked>
  __device__ __forceinline__ void accumulate(const float* values, const uint64_t (&mask)[Traits::kRows]) {
    const float* weights = weights_ + local_row(0) * Traits::kWeightFloats;
#pragma unroll 2
    for (int key = 0; key < Traits::kTile; ++key) {
      Float4 v[Traits::kColumns];
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
        v[c] = *reinterpret_cast<const Float4*>(values + key * Traits::kRowFloats + column(c));
      }
#pragma unroll
      for (int r = 0; r < Traits::kRows; ++r) {
        // 0 * NaN is NaN: what a row does not see is left out, not weighed with 0.
        if (kMasked && ((mask[r] >> key) & 1) == 0) continue;
        const float weight = weights[r * Traits::kWeightFloats + key];
        chunk.l[r] += weight;
#pragma unroll
        for (int c = 0; c < Traits::kColumns; ++c) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = chunk.acc[r * Traits::kColumns + c][e];
            x = fmaf(weight, v[c].v[e], x);
          }
        }
      }
    }
  }

  const Block& block_;
  ScoreMap<true> map_;
  float* queries_;
  float* weights_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    tree_attention_ffma(const __grid_constant__ TreeAttentionLaunch plan) {
  attend_first<FfmaEngine<Traits>>(plan);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    tree_attention_ffma_paths(const __grid_constant__ TreeAttentionLaunch plan) {
  attend_paths<FfmaEngine<Traits>>(plan);
}

}  // namespace tranche
