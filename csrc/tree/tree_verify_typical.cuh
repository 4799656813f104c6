// One block per node reads the node's row, twice, and judges its children; the last block of a sequence to
// arrive finds the path. Rows of nodes that turn out not to be accepted are read too: the blocks need not
// wait for one another.
#pragma once

#include "core/launch.cuh"
#include "tree/tree_typical.h"

namespace tranche {

struct TreeVerifyTypicalTraits {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMaxNodes = kMaxTreeNodes;
};

// Sums of both over the block's threads, in fixed order; the same to all threads.
__device__ inline float2 typical_sums(float2 own, float2* warps) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    own.x += __shfl_xor_sync(0xffffffffu, own.x, lanes);
    own.y += __shfl_xor_sync(0xffffffffu, own.y, lanes);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  float2 total = warps[0];
  for (int warp = 1; warp < TreeVerifyTypicalTraits::kWarps; ++warp) {
    total.x += warps[warp].x;
    total.y += warps[warp].y;
  }
  return total;
}

// The largest logit's ordered bits and the complement of its token; the same to all threads.
template <class T>
__device__ uint64_t typical_largest(const T* row, int32_t vocab, uint64_t* warps) {
  uint64_t best = 0;
  for (int32_t token = int32_t(threadIdx.x); token < vocab; token += TreeVerifyTypicalTraits::kThreads) {
    const uint64_t found = uint64_t(ordered_bits(to_float(row[token]))) << 32 | ~uint32_t(token);
    best = found > best ? found : best;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, best, lanes);
    best = other > best ? other : best;
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
  __syncthreads();
  best = warps[0];
  for (int warp = 1; warp < TreeVerifyTypicalTraits::kWarps; ++warp)
    best = warps[warp] > best ? warps[warp] : best;
  return best;
}

template <class T>
__device__ TypicalRow typical_read(const TreeVerifyTypicalParams& p, const T* row, float max, float2* warps) {
  float2 own = make_float2(0.0f, 0.0f);
  for (int32_t token = int32_t(threadIdx.x); token < p.vocab; token += TreeVerifyTypicalTraits::kThreads) {
    const float y = exponent_of(to_float(row[token]), {max, p.factor});
    if (!(y > kLeastTypicalExponent)) continue;
    const float e = exp2_of(y);
    own.x += e;
    own.y = rounded_fma(e, y, own.y);
  }
  const float2 sums = typical_sums(own, warps);
  return typical_row(p, max, sums.x, sums.y, log2f(sums.x));
}

template <class T>
__global__ void __launch_bounds__(TreeVerifyTypicalTraits::kThreads)
    tree_verify_typical_kernel(TreeVerifyTypicalParams p) {
  constexpr int kThreads = TreeVerifyTypicalTraits::kThreads, kMaxNodes = TreeVerifyTypicalTraits::kMaxNodes;
  SHARED(uint64_t, warp_best, TreeVerifyTypicalTraits::kWarps);
  SHARED(float2, warp_sums, TreeVerifyTypicalTraits::kWarps);
  SHARED(uint32_t, is_last, 1);
  SHARED(float, sums, kMaxNodes);
  SHARED(int32_t, depths, kMaxNodes);

  const int b = int(blockIdx.x), node = int(blockIdx.y), thread = int(threadIdx.x);
  const int64_t base = int64_t(b) * p.nodes;
  const int32_t* parents = p.parent + base;
  const int32_t count = clamped_count(p.n_nodes[b], p.nodes);
  if (node < count) {
    const T* row = static_cast<const T*>(p.logits) + b * p.logits_stride[0] + node * p.logits_stride[1];
    const uint64_t best = typical_largest(row, p.vocab, warp_best);
    const float max = from_ordered_bits(uint32_t(best >> 32));
    const bool nothing_live = max == bits_float(0xff800000u);
    if (thread == 0) p.largest[base + node] = int32_t(~uint32_t(best));
    int is_parent = 0;
    for (int32_t i = node + 1 + thread; i < count; i += kThreads) is_parent |= parent_of(parents, i) == node;
    if (__syncthreads_or(is_parent)) {
      const TypicalRow read = typical_read(p, row, max, warp_sums);
      for (int32_t i = node + 1 + thread; i < count; i += kThreads) {
        if (parent_of(parents, i) != node) continue;
        p.edge[base + i] =
            nothing_live ? bits_float(0x7fc00000u) : typical_edge(p, read, row, p.tokens[base + i]);
      }
    }
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    is_last[0] = atomicAdd(&p.arrived[b], 1u) + 1 == gridDim.y;
    __threadfence();
  }
  __syncthreads();
  if (is_last[0] == 0) return;
  for (int i = thread; i < count; i += kThreads) {
    sums[i] = i > 0 ? p.edge[base + i] : 0.0f;
    depths[i] = i > 0 ? parent_of(parents, i) : -1;
  }
  __syncthreads();
  if (thread == 0) typical_path(p, b, sums, depths);
}

}  // namespace tranche
