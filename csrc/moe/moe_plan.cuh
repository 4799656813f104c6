// One block per expert, and one for the end: it counts the ids below its own, which is where its slots begin,
// then writes its slots in order. Every block reads all ids; they are few, and no block waits for another.
#pragma once

#include "core/launch.cuh"
#include "moe/moe_plan.h"

namespace tranche {

struct MoePlanTraits {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
};

__global__ void __launch_bounds__(MoePlanTraits::kThreads) moe_plan_kernel(MoePlanParams p) {
  constexpr int kThreads = MoePlanTraits::kThreads, kWarps = MoePlanTraits::kWarps;
  SHARED(int, found, kWarps);
  const int e = int(blockIdx.x), thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int begin = 0;
  for (int first = 0; first < p.count; first += kThreads) {
    const int id = first + thread < p.count ? p.ids[first + thread] : -1;
    begin += __syncthreads_count(id >= 0 && id < e);
  }
  if (thread == 0) p.offsets[e] = begin;
  if (e == p.experts) {
    for (int i = begin + thread; i < p.count; i += kThreads) p.slots[i] = -1;
    return;
  }
  int at = begin;
  for (int first = 0; first < p.count; first += kThreads) {
    const bool mine = first + thread < p.count && p.ids[first + thread] == e;
    const unsigned lanes = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) found[warp] = __popc(lanes);
    __syncthreads();
    int slot = at + __popc(lanes & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) slot += found[w];
      at += found[w];
    }
    if (mine) p.slots[slot] = first + thread;
    __syncthreads();
  }
}

}  // namespace tranche
