// Blocks cooperate on a row. The work is cut into tickets: each is one chunk of one row in one phase of its walk, and
// a block takes them in order, one after the other:
//   ticket = (stage * B + sequence) * chunks + chunk,  stage = the how-manieth phase of the sequence's walk
// A ticket waits for the stage before it, that is for lower tickets only, and every lower ticket was taken by a
// block that is running: no assumption about how many blocks are resident, one alone would do. The last block to
// arrive at a stage draws its conclusions and opens the next one.
//
// Phases of a row, of which a greedy one needs the first, and one without cuts the first and the last:
//   kMax   the largest logit and the first token that has it
//   kBins  weight and count of each interval of y: tells which interval a cut divides
//   kSum   the kept weight of each tile, and the tokens of the divided interval as candidates; then the cut is
//          resolved among these, and the token drawn. When both top-k and top-p cut, and in different
//          intervals, kSum comes twice.
// All sums are of integers, so their order does not matter. See tree_sampling.h for the rule.
#pragma once

#include "core/launch.cuh"
#include "tree/tree_sample.h"
#include "tree/tree_sample_block.cuh"
#include "tree/tree_sampling.h"
#include "tree/tree_walk.h"

namespace tranche {

struct TreeSampleTraits {
  static constexpr int kThreads = kSampleThreads;
  static constexpr int kTile = 2048;  // tokens
  static_assert(kTile * uint64_t(1 << kLowBits) <= uint64_t(1) << 32, "a tile's low halves add up in 32 bits");
  static_assert(kTile * uint64_t(1) << (kWeightBits - kLowBits) <= uint64_t(1) << 31, "and its high halves");
};

// What CUDA's 64-bit atomics take; the same bits as uint64_t, which is another type.
using Atomic64 = unsigned long long;

enum class SamplePhase : uint32_t { kMax, kBins, kSum };

// The walk of one sequence, in memory that starts as zeros: at the root, in phase kMax. Changed by the last block to
// arrive, except for what blocks add to.
struct SampleState {
  uint32_t stage;    // open now; kSampleDone after the last
  uint32_t arrived;  // blocks, at this stage
  SamplePhase phase;
  int32_t node, depth;
  uint32_t divided;         // the interval of y that the cut divides; kBins: none
  uint32_t by_count;        // the cut to resolve is that of top-k
  uint32_t candidates;      // added to
  uint64_t before;          // weight, or count, of the intervals before the divided one
  uint64_t limit;           // of weight or count, where the cut falls
  uint64_t whole;           // weight of the intervals before the divided one
  Atomic64 best;            // added to: ordered logit, and the complement of its token
  Atomic64 first_rank_not;  // added to: complement of the least rank of the candidates
  Atomic64 last_rank;       // added to: the greatest
  Atomic64 bin_weight[kBins];  // added to
  uint32_t bin_count[kBins];   // added to
};
static_assert(sizeof(SampleState) % 8 == 0);

constexpr uint32_t kSampleDone = 0xffffffffu;

struct TreeSampleLaunch {
  TreeSampleParams params;
  int32_t tiles, chunks;  // per row
};

// Where things are in the memory that a launch gets: zeroed holds the ticket counter, the number of finished walks,
// the states, and the weights of tiles.
struct SampleMemory {
  static constexpr int64_t kHeader = 16;

  static int64_t zeroed_bytes(int64_t batch, int64_t tiles) {
    return kHeader + batch * (int64_t(sizeof(SampleState)) + tiles * int64_t(sizeof(uint64_t)));
  }
  static int64_t scratch_bytes(int64_t batch, int64_t vocab) { return batch * vocab * int64_t(sizeof(uint32_t)); }
};

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

// ---- what every block does with its tiles -----------------------------------------------------------------------

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
__device__ void sample_bins(const SampleRow<T>& row, const SampleBlock& block, int first_tile, int tile_step) {
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

// ---- what the last block to arrive does -----------------------------------------------------------------------

template <class T>
__device__ uint64_t weight_of_token(const SampleRow<T>& row, uint32_t token) {
  return weight_of(exponent_of(row.logit(token), row.scale));
}

template <class T>
__device__ uint64_t rank_of_token(const SampleRow<T>& row, uint32_t token) {
  return rank(row.logit(token), token);
}

// The rank of the candidate at which the sum of weights (or the count) of candidates, in the order of ranks,
// reaches `limit`. The range of ranks is divided by 256 until it holds one candidate.
template <class T>
__device__ uint64_t resolve(const SampleRow<T>& row, const SampleBlock& block, uint64_t limit, bool by_count) {
  constexpr int kParts = 256;
  SHARED(Atomic64, part, kParts);
  SHARED(Atomic64, range, 2);
  uint64_t first = ~row.state->first_rank_not, last = row.state->last_rank;
  const uint32_t count = row.state->candidates;
  while (first < last) {
    const int bits = 64 - __clzll((long long)(last - first));
    const int shift = bits > 8 ? bits - 8 : 0;
    for (int i = block.thread; i < kParts; i += kSampleThreads) part[i] = 0;
    if (block.thread == 0) {
      range[0] = ~uint64_t(0);
      range[1] = 0;
    }
    __syncthreads();
    for (uint32_t i = block.thread; i < count; i += kSampleThreads) {
      const uint32_t token = row.candidates[i];
      const uint64_t place = rank_of_token(row, token);
      if (place < first || place > last) continue;
      atomicAdd(&part[(place - first) >> shift], by_count ? 1 : weight_of_token(row, token));
    }
    __syncthreads();
    const SampleCrossing at = block.crossing(kParts, limit, [&](int i) { return uint64_t(part[i]); });
    limit -= at.before;
    const uint64_t low = first + (uint64_t(at.index) << shift);
    const uint64_t high = low + ((uint64_t(1) << shift) - 1);
    for (uint32_t i = block.thread; i < count; i += kSampleThreads) {
      const uint64_t place = rank_of_token(row, row.candidates[i]);
      if (place < low || place > high) continue;
      atomicMin(&range[0], place);
      atomicMax(&range[1], place);
    }
    __syncthreads();
    first = range[0];
    last = range[1];
    __syncthreads();  // before the next round, or the next cut, writes what others read here
  }
  return first;
}

// Candidates of another interval are to be gathered.
template <class T>
__device__ void forget_candidates(const SampleRow<T>& row, const SampleBlock& block) {
  if (block.thread != 0) return;
  row.state->candidates = 0;
  row.state->first_rank_not = 0;
  row.state->last_rank = 0;
}

// The next phase is kSum, and top-p's cut falls where the sum of weights reaches `limit`.
template <class T>
__device__ void divide_by_weight(const SampleRow<T>& row, const SampleBlock& block, uint64_t limit) {
  SampleState& state = *row.state;
  const SampleCrossing at = block.crossing(kBins, limit, [&](int i) { return uint64_t(state.bin_weight[i]); });
  if (block.thread != 0) return;
  state.divided = uint32_t(at.index);
  state.before = state.whole = at.before;
  state.limit = limit;
  state.by_count = 0;
}

template <class T>
__device__ void conclude_bins(const SampleRow<T>& row, const SampleBlock& block) {
  SampleState& state = *row.state;
  uint64_t live = 0, total = 0;
  for (int bin = block.thread; bin < kBins; bin += kSampleThreads) {
    live += state.bin_count[bin];
    total += state.bin_weight[bin];
  }
  live = block.sum(live);
  total = block.sum(total);
  const uint64_t k = uint64_t(row.sampling.top_k);
  const bool by_count = row.sampling.cuts_count(row.vocab) && k < live;
  if (by_count) {
    const SampleCrossing at = block.crossing(kBins, k, [&](int i) { return uint64_t(state.bin_count[i]); });
    uint64_t whole = 0;
    for (int bin = block.thread; bin < at.index; bin += kSampleThreads) whole += state.bin_weight[bin];
    whole = block.sum(whole);
    if (block.thread == 0) {
      state.divided = uint32_t(at.index);
      state.before = at.before;
      state.whole = whole;
      state.limit = k;
      state.by_count = 1;
    }
  } else if (row.sampling.cuts_mass()) {
    divide_by_weight(row, block, top_p_limit(row.sampling.top_p, total));
  } else if (block.thread == 0) {
    state.divided = kBins;
  }
  if (block.thread == 0) state.phase = SamplePhase::kSum;
}

// The drawn token; -1 when the candidates of another interval are needed first.
template <class T>
__device__ int64_t conclude_sum(const SampleRow<T>& row, const SampleBlock& block, uint64_t bits) {
  constexpr int kTile = TreeSampleTraits::kTile;
  SampleState& state = *row.state;
  uint64_t cut = ~uint64_t(0);
  if (state.divided < kBins) {
    cut = resolve(row, block, state.limit - state.before, state.by_count != 0);
    if (state.by_count != 0 && row.sampling.cuts_mass()) {
      uint64_t kept = 0;
      for (uint32_t i = block.thread; i < state.candidates; i += kSampleThreads) {
        const uint32_t token = row.candidates[i];
        if (rank_of_token(row, token) <= cut) kept += weight_of_token(row, token);
      }
      const uint64_t limit = top_p_limit(row.sampling.top_p, state.whole + block.sum(kept));
      if (limit <= state.whole) {
        divide_by_weight(row, block, limit);
        forget_candidates(row, block);
        return -1;
      }
      cut = resolve(row, block, limit - state.whole, false);
    }
    for (uint32_t i = block.thread; i < state.candidates; i += kSampleThreads) {
      const uint32_t token = row.candidates[i];
      if (rank_of_token(row, token) <= cut) {
        atomicAdd(&row.tile_weight[token / kTile], weight_of_token(row, token));
      }
    }
    __syncthreads();
  }
  uint64_t total = 0;
  for (int tile = block.thread; tile < row.tiles; tile += kSampleThreads) total += row.tile_weight[tile];
  const uint64_t target = multiply_high(bits, block.sum(total)) + 1;
  const SampleCrossing tile = block.crossing(row.tiles, target, [&](int i) { return uint64_t(row.tile_weight[i]); });
  const int first = tile.index * kTile;
  const int count = row.vocab - first < kTile ? row.vocab - first : kTile;
  const SampleCrossing at = block.crossing(count, target - tile.before, [&](int i) {
    const uint32_t token = uint32_t(first + i);
    return rank_of_token(row, token) <= cut ? weight_of_token(row, token) : 0;
  });
  return first + at.index;
}

// The first child of the walk's node that has the token, or -1.
__device__ inline int32_t child_with(const TreeSampleParams& p, const SampleBlock& block, int b, int32_t node,
                                     int64_t token) {
  if (p.tokens == nullptr) return -1;
  const int64_t row = int64_t(b) * p.nodes;
  const int32_t count = clamped_count(p.n_nodes[b], p.nodes);
  uint64_t found = 0;  // the complement, so that the greatest is the first
  for (int32_t i = node + 1 + block.thread; i < count && found == 0; i += kSampleThreads) {
    if (p.tokens[row + i] == token && parent_of(p.parent + row, i) == node) found = uint64_t(kMaxTreeNodes - i);
  }
  found = block.max(found);
  return found == 0 ? -1 : kMaxTreeNodes - int32_t(found);
}

// Goes down to the child that has the token, or ends the walk. Returns whether it has ended.
template <class T>
__device__ bool take_token(const TreeSampleParams& p, const SampleRow<T>& row, const SampleBlock& block, int b,
                           int64_t token) {
  SampleState& state = *row.state;
  const int32_t node = state.node, depth = state.depth;
  const int32_t child = child_with(p, block, b, node, token);
  int32_t* path = p.path == nullptr ? nullptr : p.path + int64_t(b) * p.nodes;
  if (path != nullptr && block.thread == 0) path[depth] = node;
  if (child < 0) {
    if (block.thread == 0) {
      p.next_token[b] = token;
      if (p.length != nullptr) p.length[b] = depth;
    }
    for (int i = depth + 1 + block.thread; path != nullptr && i < p.nodes; i += kSampleThreads) path[i] = -1;
    return true;
  }
  for (int bin = block.thread; bin < kBins; bin += kSampleThreads) {
    state.bin_weight[bin] = 0;
    state.bin_count[bin] = 0;
  }
  forget_candidates(row, block);
  if (block.thread == 0) {
    state.node = child;
    state.depth = depth + 1;
    state.best = 0;
    state.phase = SamplePhase::kMax;
  }
  return false;
}

// What follows from a stage. Returns whether the walk has ended.
template <class T>
__device__ bool conclude(const TreeSampleParams& p, const SampleRow<T>& row, const SampleBlock& block, int b) {
  SampleState& state = *row.state;
  const SamplePhase phase = state.phase;
  const uint64_t best = state.best;
  __syncthreads();  // all have read what is about to change
  int64_t token = -1;
  if (phase == SamplePhase::kMax) {
    const bool nothing_live = uint32_t(best >> 32) == ordered_bits(bits_float(0xff800000u));
    if (row.sampling.greedy() || nothing_live) {
      token = ~uint32_t(best);
    } else if (block.thread == 0) {
      const bool cuts = row.sampling.cuts_count(row.vocab) || row.sampling.cuts_mass();
      state.phase = cuts ? SamplePhase::kBins : SamplePhase::kSum;
      state.divided = kBins;
    }
  } else if (phase == SamplePhase::kBins) {
    conclude_bins(row, block);
  } else {
    token = conclude_sum(row, block, random_bits(uint64_t(p.seed[b]), uint64_t(p.position[b]) + state.depth));
  }
  __syncthreads();
  return token >= 0 && take_token(p, row, block, b, token);
}

// ---- the kernel ---------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(TreeSampleTraits::kThreads) tree_sample_kernel(TreeSampleLaunch launch) {
  SHARED(uint32_t, shared_ticket, 1);
  SHARED(uint32_t, shared_stage, 1);
  SHARED(uint32_t, shared_last, 1);
  const TreeSampleParams& p = launch.params;
  const SampleBlock block;
  const int thread = int(threadIdx.x);
  uint32_t* const tickets = static_cast<uint32_t*>(p.zeroed);
  uint32_t* const finished = tickets + 1;
  auto* const states = reinterpret_cast<SampleState*>(static_cast<char*>(p.zeroed) + SampleMemory::kHeader);
  auto* const tile_weights = reinterpret_cast<Atomic64*>(states + p.batch);

  for (;;) {
    if (thread == 0) shared_ticket[0] = atomicAdd(tickets, 1u);
    __syncthreads();
    const uint32_t ticket = shared_ticket[0];
    const int chunk = int(ticket % launch.chunks), b = int(ticket / launch.chunks % p.batch);
    const uint32_t stage = ticket / launch.chunks / p.batch;
    SampleState& state = states[b];

    const bool empty = p.n_nodes != nullptr && clamped_count(p.n_nodes[b], p.nodes) == 0;
    if (empty && stage == 0 && chunk == 0) {
      for (int i = thread; i < p.nodes; i += kSampleThreads) p.path[int64_t(b) * p.nodes + i] = -1;
      if (thread == 0) {
        p.length[b] = 0;
        p.next_token[b] = -1;
        atomicExch(&state.stage, kSampleDone);
        atomicAdd(finished, 1u);
      }
    }
    if (thread == 0) {
      uint32_t open = atomicAdd(&state.stage, 0u);
      while (open < stage && !empty) {
        __nanosleep(40);
        open = atomicAdd(&state.stage, 0u);
      }
      __threadfence();
      shared_stage[0] = empty ? kSampleDone : open;
      shared_last[0] = shared_stage[0] == kSampleDone && atomicAdd(finished, 0u) == uint32_t(p.batch);
    }
    __syncthreads();
    const bool done = shared_stage[0] == kSampleDone, all_done = shared_last[0] != 0;
    __syncthreads();
    if (all_done) return;
    if (done) continue;

    const T* logits = static_cast<const T*>(p.logits) + b * p.logits_stride[0] + state.node * p.logits_stride[1];
    const Sampling sampling = {p.temperature[b], p.top_p[b], p.top_k[b]};
    const SamplePhase phase = state.phase;
    const float max = phase == SamplePhase::kMax ? 0.0f : from_ordered_bits(uint32_t(state.best >> 32));
    const RowScale scale = {max, kLog2E / sampling.temperature};
    const SampleRow<T> row = {logits,
                              p.vocab,
                              launch.tiles,
                              sampling,
                              scale,
                              &state,
                              tile_weights + int64_t(b) * launch.tiles,
                              static_cast<uint32_t*>(p.scratch) + int64_t(b) * p.vocab};
    switch (phase) {
      case SamplePhase::kMax: sample_max(row, block, chunk, launch.chunks); break;
      case SamplePhase::kBins: sample_bins(row, block, chunk, launch.chunks); break;
      case SamplePhase::kSum: sample_sum(row, block, chunk, launch.chunks); break;
    }

    __threadfence();
    __syncthreads();
    if (thread == 0) shared_last[0] = atomicAdd(&state.arrived, 1u) + 1 == uint32_t(launch.chunks);
    __syncthreads();
    if (shared_last[0] == 0) continue;

    __threadfence();
    const bool ended = conclude(p, row, block, b);
    __threadfence();
    __syncthreads();
    if (thread == 0) {
      atomicExch(&state.arrived, 0u);
      __threadfence();
      atomicExch(&state.stage, ended ? kSampleDone : stage + 1);
      if (ended) atomicAdd(finished, 1u);
    }
  }
}

}  // namespace tranche
