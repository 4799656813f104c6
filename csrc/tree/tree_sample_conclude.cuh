// What the last block to arrive at a stage of a walk concludes: where the cuts fall, which token is drawn,
// and where the walk goes.
#pragma once

#include "tree/tree_sample_row.cuh"
#include "tree/tree_walk.h"

namespace tranche {

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
__device__ uint64_t resolve(const SampleRow<T>& row, const SampleBlock& block, uint64_t limit,
                            bool by_count) {
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
  const SampleCrossing at =
      block.crossing(kBins, limit, [&](int i) { return uint64_t(state.bin_weight[i]); });
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
  const SampleCrossing tile =
      block.crossing(row.tiles, target, [&](int i) { return uint64_t(row.tile_weight[i]); });
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
    if (p.tokens[row + i] == token && parent_of(p.parent + row, i) == node)
      found = uint64_t(kMaxTreeNodes - i);
  }
  found = block.max(found);
  return found == 0 ? -1 : kMaxTreeNodes - int32_t(found);
}

// Goes down to the child that has the token, or ends the walk. Returns whether it has ended.
template <class T>
__device__ bool take_token(const TreeSampleParams& p, const SampleRow<T>& row, const SampleBlock& block,
                           int b, int64_t token) {
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
__device__ bool conclude(const TreeSampleParams& p, const SampleRow<T>& row, const SampleBlock& block,
                         int b) {
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

}  // namespace tranche
