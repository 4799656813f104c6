// One sequence's row and the state of its walk, and what every block does with its share of the row.
#pragma once

#include "core/launch.cuh"
#include "tree/tree_sample.h"
#include "tree/tree_sample_block.cuh"
#include "tree/tree_sampling.h"

namespace tranche {

struct TreeSampleTraits {
  static constexpr int kThreads = kSampleThreads;
  static constexpr int kTile = 2048;  // tokens
  static_assert(kTile * uint64_t(1 << kLowBits) <= uint64_t(1) << 32,
                "a tile's low halves add up in 32 bits");
  static_assert(kTile * uint64_t(1) << (kWeightBits - kLowBits) <= uint64_t(1) << 31, "and its high halves");
};

// What CUDA's 64-bit atomics take; the same bits as uint64_t, which is another type.
using Atomic64 = unsigned long long;

enum class SamplePhase : uint32_t { kMax, kBins, kSum };

// The walk of one sequence, in memory that starts as zeros: at the root, in phase kMax. Changed by the last
// block to arrive, except for what blocks add to.
struct SampleState {
  uint32_t stage;    // open now; kSampleDone after the last
  uint32_t arrived;  // blocks, at this stage
  SamplePhase phase;
  int32_t node, depth;
  uint32_t divided;            // the interval of y that the cut divides; kBins: none
  uint32_t by_count;           // the cut to resolve is that of top-k
  uint32_t candidates;         // added to
  uint64_t before;             // weight, or count, of the intervals before the divided one
  uint64_t limit;              // of weight or count, where the cut falls
  uint64_t whole;              // weight of the intervals before the divided one
  Atomic64 best;               // added to: ordered logit, and the complement of its token
  Atomic64 first_rank_not;     // added to: complement of the least rank of the candidates
  Atomic64 last_rank;          // added to: the greatest
  Atomic64 bin_weight[kBins];  // added to
  uint32_t bin_count[kBins];   // added to
};
static_assert(sizeof(SampleState) % 8 == 0);

constexpr uint32_t kSampleDone = 0xffffffffu;

// One sequence's row, as the threads of a block see it.
template <class T>
struct SampleRow {
  const T* logits;
  int32_t vocab, tiles;
  Sampling sampling;
  RowScale scale;
  SampleState* state;
  Atomic64* tile_weight;  // [tiles], added to
  uint32_t* candidates;   // [vocab] tokens

  __device__ float logit(uint32_t token) const { return to_float(logits[token]); }
};

template <class T>
__device__ void sample_max(const SampleRow<T>& row, const SampleBlock& block, int first_tile, int tile_step) {
  constexpr int kTile = TreeSampleTraits::kTile, kThreads = TreeSampleTraits::kThreads;
  uint64_t best = 0;
  for (int tile = first_tile; tile < row.tiles; tile += tile_step) {
#pragma unroll
    for (int i = 0; i < kTile / kThreads; ++i) {
      const int token = tile * kTile + i * kThreads + block.thread;
      if (token >= row.vocab) break;
      const uint64_t found = uint64_t(ordered_bits(row.logit(token))) << 32 | ~uint32_t(token);
      best = found > best ? found : best;
    }
  }
  best = block.max(best);
  if (block.thread == 0) atomicMax(&row.state->best, best);
}

template <class T>
__device__ void sample_bins(const SampleRow<T>& row, const SampleBlock& block, int first_tile,
                            int tile_step) {
  constexpr int kTile = TreeSampleTraits::kTile, kThreads = TreeSampleTraits::kThreads;
  SHARED(uint32_t, low, kBins);
  SHARED(uint32_t, high, kBins);
  SHARED(uint32_t, count, kBins);
  for (int bin = block.thread; bin < kBins; bin += kThreads) low[bin] = high[bin] = count[bin] = 0;
  __syncthreads();
  for (int tile = first_tile; tile < row.tiles; tile += tile_step) {
#pragma unroll
    for (int i = 0; i < kTile / kThreads; ++i) {
      const int token = tile * kTile + i * kThreads + block.thread;
      if (token >= row.vocab) break;
      const float y = exponent_of(row.logit(token), row.scale);
      if (!is_live(y)) continue;
      const uint64_t weight = weight_of(y);
      const int bin = bin_of(y);
      // Shared memory adds 32 bits at once, so the halves are kept apart.
      atomicAdd(&low[bin], uint32_t(weight) & ((1u << kLowBits) - 1));
      atomicAdd(&high[bin], uint32_t(weight >> kLowBits));
      atomicAdd(&count[bin], 1u);
    }
    __syncthreads();
    for (int bin = block.thread; bin < kBins; bin += kThreads) {
      if (count[bin] == 0) continue;
      atomicAdd(&row.state->bin_weight[bin], (uint64_t(high[bin]) << kLowBits) + low[bin]);
      atomicAdd(&row.state->bin_count[bin], count[bin]);
      low[bin] = high[bin] = count[bin] = 0;
    }
    __syncthreads();
  }
}

template <class T>
__device__ void sample_sum(const SampleRow<T>& row, const SampleBlock& block, int first_tile, int tile_step) {
  constexpr int kTile = TreeSampleTraits::kTile, kThreads = TreeSampleTraits::kThreads;
  SHARED(uint32_t, found, 1);  // candidates of the tile, then where they go
  const int divided = int(row.state->divided);
  for (int tile = first_tile; tile < row.tiles; tile += tile_step) {
    uint64_t sum = 0, first_not = 0, last = 0;
    uint32_t mine = 0;  // a bit per token of this thread that is a candidate
    if (block.thread == 0) found[0] = 0;
#pragma unroll
    for (int i = 0; i < kTile / kThreads; ++i) {
      const int token = tile * kTile + i * kThreads + block.thread;
      if (token >= row.vocab) break;
      const float x = row.logit(token), y = exponent_of(x, row.scale);
      if (!is_live(y)) continue;
      const int bin = bin_of(y);
      if (bin < divided) sum += weight_of(y);
      if (bin == divided) {
        const uint64_t place = rank(x, uint32_t(token));
        first_not = ~place > first_not ? ~place : first_not;
        last = place > last ? place : last;
        mine |= 1u << i;
      }
    }
    sum = block.sum(sum);
    if (block.thread == 0) row.tile_weight[tile] = sum;
    if (__syncthreads_or(mine != 0) == 0) continue;
    uint32_t slot = mine == 0 ? 0 : atomicAdd(&found[0], uint32_t(__popc(mine)));
    first_not = block.max(first_not);
    last = block.max(last);
    if (block.thread == 0) {
      found[0] = atomicAdd(&row.state->candidates, found[0]);
      atomicMax(&row.state->first_rank_not, first_not);
      atomicMax(&row.state->last_rank, last);
    }
    __syncthreads();
    slot += found[0];
    for (int i = 0; i < kTile / kThreads; ++i) {
      if (mine >> i & 1u) row.candidates[slot++] = uint32_t(tile * kTile + i * kThreads + block.thread);
    }
    __syncthreads();  // before the next tile counts from 0
  }
}

}  // namespace tranche
