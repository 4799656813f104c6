// Blocks cooperate on a row. The work is cut into tickets: each is one chunk of one row in one phase of its
// walk, and a block takes them in order, one after the other:
//   ticket = (stage * B + sequence) * chunks + chunk,  stage = the number of the phase of the sequence's walk
// A ticket waits for the stage before it, that is for lower tickets only, and every lower ticket was taken by
// a block that is running: no assumption about how many blocks are resident, one alone would do. The last
// block to arrive at a stage draws its conclusions and opens the next one.
//
// Phases of a row, of which a greedy one needs the first, and one without cuts the first and the last:
//   kMax   the largest logit and the first token that has it
//   kBins  weight and count of each interval of y: tells which interval a cut divides
//   kSum   the kept weight of each tile, and the tokens of the divided interval as candidates; then the cut
//   is
//          resolved among these, and the token drawn. When both top-k and top-p cut, and in different
//          intervals, kSum comes twice.
// All sums are of integers, so their order does not matter. See tree_sampling.h for the rule.
#pragma once

#include "tree/tree_sample_conclude.cuh"
#include "tree/tree_sample_row.cuh"

namespace tranche {

struct TreeSampleLaunch {
  TreeSampleParams params;
  int32_t tiles, chunks;  // per row
};

// Where things are in the memory that a launch gets: zeroed holds the ticket counter, the number of finished
// walks, the states, and the weights of tiles.
struct SampleMemory {
  static constexpr int64_t kHeader = 16;

  static int64_t zeroed_bytes(int64_t batch, int64_t tiles) {
    return kHeader + batch * (int64_t(sizeof(SampleState)) + tiles * int64_t(sizeof(uint64_t)));
  }
  static int64_t scratch_bytes(int64_t batch, int64_t vocab) {
    return batch * vocab * int64_t(sizeof(uint32_t));
  }
};

template <class T>
__global__ void __launch_bounds__(TreeSampleTraits::kThreads, 2) tree_sample_kernel(TreeSampleLaunch launch) {
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

    const T* logits =
        static_cast<const T*>(p.logits) + b * p.logits_stride[0] + state.node * p.logits_stride[1];
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
      case SamplePhase::kMax:
        sample_max(row, block, chunk, launch.chunks);
        break;
      case SamplePhase::kBins:
        sample_bins(row, block, chunk, launch.chunks);
        break;
      case SamplePhase::kSum:
        sample_sum(row, block, chunk, launch.chunks);
        break;
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
