// One block ranks one tile of a row of logprobs, which it holds in registers; the last block of a sequence to
// finish merges the sequence's lists.
//
// Within a tile: the k-th largest of the threads' own maxima bounds the k-th largest of the tile from below,
// and at most k threads reach it, so that at most k * kPerThread elements pass to the exact ranking. Elements
// are compared as whole numbers, (score, lower token) in one, all different: the result does not depend on
// how the row was cut.
#pragma once

#include "core/launch.cuh"
#include "core/ordered.h"
#include "tree/tree_expand_beam.h"

namespace tranche {

struct TreeExpandBeamTraits {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPerThread = 32;
  static constexpr int kTileBits = 13;
  static constexpr int kTile = kThreads * kPerThread;
  static constexpr int kMaxLists = 128;  // that a warp merges: 4 heads in each lane
  static constexpr int kListsPerLane = kMaxLists / 32;
  static constexpr int kPool = kMaxBeam * kPerThread;  // entries that may pass to the ranking
  static constexpr int kWarpPool = kPool / kWarps;     // the same memory, split for the merge
  static_assert(kTile == 1 << kTileBits);
  static_assert(kMaxVocab <= int64_t(kMaxLists) * kTile && kMaxBeam <= kMaxLists, "merged by one warp");
  static_assert(kMaxBeam <= kThreads, "the bound counts threads");
  static_assert(kPool * sizeof(uint64_t) + 1024 <= 48 * 1024, "static shared memory");
};

// (score, lower index), never 0.
__device__ __forceinline__ uint64_t entry_of(uint32_t score, uint32_t index) {
  return uint64_t(score) << 32 | uint32_t(~index);
}
__device__ __forceinline__ uint32_t score_of(uint64_t entry) { return uint32_t(entry >> 32); }
__device__ __forceinline__ uint32_t index_of(uint64_t entry) { return ~uint32_t(entry); }

__device__ __forceinline__ uint64_t warp_max(uint64_t x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, x, lane);
    x = other > x ? other : x;
  }
  return x;
}

// The k largest of `count` lists of k entries each, all in descending order; take(rank, entry) is called by
// the whole warp. 0 marks the end of a list.
template <class Take>
__device__ __forceinline__ void warp_merge(const uint64_t* lists, int count, int k, const Take& take) {
  constexpr int kListsPerLane = TreeExpandBeamTraits::kListsPerLane;
  const int lane = int(threadIdx.x % 32);
  uint64_t head[kListsPerLane];
  int position[kListsPerLane];
#pragma unroll
  for (int i = 0; i < kListsPerLane; ++i) {
    const int list = lane + 32 * i;
    head[i] = list < count ? lists[list * k] : 0;
    position[i] = 0;
  }
  for (int rank = 0; rank < k; ++rank) {
    uint64_t own = 0;
#pragma unroll
    for (int i = 0; i < kListsPerLane; ++i) own = head[i] > own ? head[i] : own;
    const uint64_t best = warp_max(own);
    take(rank, best);
#pragma unroll
    for (int i = 0; i < kListsPerLane; ++i) {
      if (head[i] != best || best == 0) continue;
      ++position[i];
      head[i] = position[i] < k ? lists[(lane + 32 * i) * k + position[i]] : 0;
    }
  }
}

// This thread's scores as ordered bits; 0 past the row's end. Element j is number (j / W) * kThreads * W +
// thread * W
// + j % W of the tile, whether or not it can be loaded W at a time.
template <class T>
__device__ __forceinline__ void load_scores(const T* row, int tile_start, int vocab, float beam, bool aligned,
                                            uint32_t (&scores)[TreeExpandBeamTraits::kPerThread]) {
  constexpr int kThreads = TreeExpandBeamTraits::kThreads, kPerThread = TreeExpandBeamTraits::kPerThread;
  constexpr int W = 16 / int(sizeof(T));
  struct alignas(16) Wide {
    T element[W];
  };
#pragma unroll
  for (int j = 0; j < kPerThread; j += W) {
    const int at = tile_start + j * kThreads + int(threadIdx.x) * W;
    Wide wide{};
    if (aligned && at + W <= vocab) {
      wide = *reinterpret_cast<const Wide*>(row + at);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if (at + i < vocab) wide.element[i] = row[at + i];
      }
    }
#pragma unroll
    for (int i = 0; i < W; ++i) {
      scores[j + i] = at + i < vocab ? ordered_bits(to_float(wide.element[i]) + beam) : 0;
    }
  }
}

// Ranks the block's tile: list[0..k) in descending order, 0 where the tile has fewer elements.
template <class T>
__device__ __forceinline__ void rank_tile(const TreeExpandBeamParams& p, const T* row, int tile_start,
                                          float beam, bool aligned, uint64_t* pool, int32_t* pool_count,
                                          uint64_t* list) {
  using Traits = TreeExpandBeamTraits;
  constexpr int W = 16 / int(sizeof(T)), kTileBits = Traits::kTileBits;
  const int thread = int(threadIdx.x);
  uint32_t scores[Traits::kPerThread];
  load_scores(row, tile_start, p.vocab, beam, aligned, scores);

  // Within a tile: (score, lower place in the tile).
  const auto place = [&](int j) { return (j / W) * Traits::kThreads * W + thread * W + j % W; };
  const auto short_entry = [&](int j) {
    return scores[j] == 0 ? 0 : uint64_t(scores[j]) << kTileBits | uint64_t(Traits::kTile - 1 - place(j));
  };
  uint64_t most = 0;
#pragma unroll
  for (int j = 0; j < Traits::kPerThread; ++j) most = short_entry(j) > most ? short_entry(j) : most;

  // The k-th largest maximum, bit by bit; any value that exactly k threads reach will do.
  uint64_t bound = 0;
  for (int bit = 32 + kTileBits - 1; bit >= 0; --bit) {
    const uint64_t higher = bound | uint64_t(1) << bit;
    const int reach = __syncthreads_count(most >= higher);
    if (reach >= p.k) bound = higher;
    if (reach == p.k) break;
  }

  if (thread == 0) *pool_count = 0;
  __syncthreads();
  if (most >= bound) {
#pragma unroll
    for (int j = 0; j < Traits::kPerThread; ++j) {
      if (scores[j] != 0 && short_entry(j) >= bound) {
        pool[atomicAdd(pool_count, 1)] = entry_of(scores[j], uint32_t(tile_start + place(j)));
      }
    }
  }
  __syncthreads();
  const int count = *pool_count;
  for (int i = thread; i < count; i += Traits::kThreads) {
    const uint64_t own = pool[i];
    int rank = 0;
    for (int other = 0; other < count; ++other) rank += pool[other] > own;
    if (rank < p.k) list[rank] = own;
  }
  for (int i = count + thread; i < p.k; i += Traits::kThreads) list[i] = 0;
}

// The candidates of every beam of sequence b, then the new beam. `lists`: [beams][tiles][k].
__device__ __forceinline__ void merge_sequence(const TreeExpandBeamParams& p, int b, int tiles,
                                               const uint64_t* lists, uint64_t* pool) {
  using Traits = TreeExpandBeamTraits;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, k = p.k;
  float* candidate_scores = static_cast<float*>(p.candidate_scores) + int64_t(b) * p.beams * k;
  int64_t* candidate_tokens = p.candidate_tokens + int64_t(b) * p.beams * k;

  uint64_t* staging = pool + warp * Traits::kWarpPool;
  const bool fits = tiles * k <= Traits::kWarpPool;
  for (int beam = warp; beam < p.beams; beam += Traits::kWarps) {
    const uint64_t* own = lists + int64_t(beam) * tiles * k;
    if (fits) {
      for (int i = lane; i < tiles * k; i += 32) staging[i] = __ldcg(own + i);
      __syncwarp();
    }
    warp_merge(fits ? staging : own, tiles, k, [&](int rank, uint64_t entry) {
      if (lane != 0) return;
      candidate_scores[beam * k + rank] = float_of_ordered(score_of(entry));
      candidate_tokens[beam * k + rank] = int64_t(index_of(entry));
    });
    __syncwarp();
  }
  __syncthreads();

  // Every beam's candidates are a list in descending order of (score, lower flat position) as well.
  const bool beam_fits = p.beams * k <= Traits::kPool;
  for (int i = int(threadIdx.x); beam_fits && i < p.beams * k; i += Traits::kThreads) {
    pool[i] = entry_of(ordered_bits(candidate_scores[i]), uint32_t(i));
  }
  uint64_t* spill = const_cast<uint64_t*>(lists);  // at least beams * k entries, no longer needed
  for (int i = int(threadIdx.x); !beam_fits && i < p.beams * k; i += Traits::kThreads) {
    spill[i] = entry_of(ordered_bits(candidate_scores[i]), uint32_t(i));
  }
  __syncthreads();
  if (warp != 0) return;
  warp_merge(beam_fits ? pool : spill, p.beams, k, [&](int rank, uint64_t entry) {
    if (lane != 0) return;
    const int flat = int(index_of(entry));
    static_cast<float*>(p.scores)[int64_t(b) * k + rank] = float_of_ordered(score_of(entry));
    p.parent_beam[int64_t(b) * k + rank] = flat / k;
    p.tokens[int64_t(b) * k + rank] = candidate_tokens[flat];
  });
}

// Grid: tile, beam, sequence.
template <class T>
__global__ void __launch_bounds__(TreeExpandBeamTraits::kThreads)
    tree_expand_beam_kernel(TreeExpandBeamParams p) {
  using Traits = TreeExpandBeamTraits;
  SHARED(uint64_t, pool, Traits::kPool);
  SHARED(int32_t, pool_count, 1);
  SHARED(uint32_t, arrived, 1);
  const int tile = int(blockIdx.x), tiles = int(gridDim.x), beam = int(blockIdx.y), b = int(blockIdx.z);
  const T* row = static_cast<const T*>(p.logprobs) + b * p.logprobs_stride[0] + beam * p.logprobs_stride[1];
  const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  const float beam_score = static_cast<const float*>(p.beam_scores)[int64_t(b) * p.beams + beam];
  uint64_t* lists = static_cast<uint64_t*>(p.workspace) + int64_t(b) * p.beams * tiles * p.k;
  rank_tile(p, row, tile * Traits::kTile, beam_score, aligned, pool, pool_count,
            lists + (int64_t(beam) * tiles + tile) * p.k);

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) arrived[0] = atomicAdd(p.arrivals + b, 1u);
  __syncthreads();
  if (arrived[0] != gridDim.x * gridDim.y - 1) return;
  __threadfence();
  merge_sequence(p, b, tiles, lists, pool);
}

}  // namespace tranche
