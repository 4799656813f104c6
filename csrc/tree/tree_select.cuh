// One block per tree. Keys come by pointer doubling over the candidates' parents; the least kept (key, lower
// index) is found bit by bit, counting across the block; a running count in order of index numbers the kept
// candidates; and tree_ancestors_block.cuh finishes the tree.
#pragma once

#include "core/launch.cuh"
#include "core/ordered.h"
#include "tree/tree_ancestors_block.cuh"
#include "tree/tree_select.h"

namespace tranche {

struct TreeSelectTraits {
  static constexpr int kMaxThreads = 1024;
  static constexpr int kPerThread = kMaxCandidates / kMaxThreads;
  static_assert(kPerThread * kMaxThreads == kMaxCandidates);
  static_assert(kMaxTreeNodes <= kMaxThreads, "a node is a thread");
};

// Bytes of dynamic shared memory: keys and jumps of the candidates, later the ancestors' bits in their place,
// and every node's parent.
TRANCHE_HD size_t tree_select_smem(int candidates) {
  const size_t own = size_t(candidates) * (sizeof(uint32_t) + sizeof(int32_t));
  const size_t work = own > sizeof(TreeAncestorsShared) ? own : sizeof(TreeAncestorsShared);
  return (work + 15) / 16 * 16 + size_t(kMaxTreeNodes) * sizeof(int32_t);
}

// Candidate c of this thread is number i * blockDim.x + threadIdx.x.
template <int kPerThread>
__global__ void __launch_bounds__(TreeSelectTraits::kMaxThreads) tree_select_kernel(TreeSelectParams p) {
  SHARED(int32_t, warp_totals, 32);
  unsigned char* smem = dynamic_smem<unsigned char>();
  const int n = p.candidates, kept = kept_candidates(p), count = kept + 1;
  const int thread = int(threadIdx.x), threads = int(blockDim.x), b = int(blockIdx.x);
  uint32_t* key_of = reinterpret_cast<uint32_t*>(smem);       // [C]
  int32_t* jump_of = reinterpret_cast<int32_t*>(key_of + n);  // [C], then the candidates' nodes
  int32_t* parent_of = reinterpret_cast<int32_t*>(smem + tree_select_smem(n)) - kMaxTreeNodes;  // [N]

  const float* scores = static_cast<const float*>(p.scores) + int64_t(b) * n;
  uint32_t key[kPerThread];
  int32_t parent[kPerThread], jump[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int c = i * threads + thread;
    key[i] = c < n ? ordered_bits(scores[c]) : 0;
    parent[i] = c < n ? p.parents[int64_t(b) * n + c] : -1;
    if (parent[i] < 0 || parent[i] >= c) parent[i] = -1;
    jump[i] = parent[i];
  }

  // After a round a key is the least over twice as many ancestors.
  bool more = true;
  while (more) {
    bool own_more = false;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int c = i * threads + thread;
      if (c < n) {
        key_of[c] = key[i];
        jump_of[c] = jump[i];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (jump[i] < 0) continue;
      key[i] = key_of[jump[i]] < key[i] ? key_of[jump[i]] : key[i];
      jump[i] = jump_of[jump[i]];
      own_more = own_more || jump[i] >= 0;
    }
    more = __syncthreads_or(own_more) != 0;  // also: all have read before the next round writes
  }

  // The kept-th greatest (key, lower index): any bound that exactly `kept` candidates reach.
  int index_bits = 0;
  while ((1 << index_bits) < n) ++index_bits;
  const auto entry = [&](int i) {
    const int c = i * threads + thread;
    return c < n ? uint64_t(key[i]) << index_bits | uint64_t((1 << index_bits) - 1 - c) : 0;
  };
  uint64_t bound = 0;
  for (int bit = 32 + index_bits - 1; bit >= 0; --bit) {
    const uint64_t higher = bound | uint64_t(1) << bit;
    int reach = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) reach += __syncthreads_count(entry(i) >= higher);
    if (reach >= kept) bound = higher;
    if (reach == kept) break;
  }

  // Number the kept candidates in order of index; node 0 is the root.
  int first = 1;
  int32_t node[kPerThread];
  const int warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int c = i * threads + thread;
    const bool keep = kept > 0 && c < n && entry(i) >= bound;
    const unsigned vote = __ballot_sync(0xffffffffu, keep);
    if (lane == 0) warp_totals[warp] = __popc(vote);
    __syncthreads();
    int before = first;
    for (int w = 0; w < threads / 32; ++w) {
      before += w < warp ? warp_totals[w] : 0;
      first += warp_totals[w];
    }
    node[i] = keep ? before + __popc(vote & ((1u << lane) - 1u)) : -1;
    if (keep) jump_of[c] = node[i];
    __syncthreads();
  }

  if (thread < p.nodes) parent_of[thread] = -1;
  __syncthreads();
  const int64_t row = int64_t(b) * p.nodes;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (node[i] < 0) continue;
    const int c = i * threads + thread;
    parent_of[node[i]] = parent[i] < 0 ? 0 : jump_of[parent[i]];
    p.node_tokens[row + node[i]] = p.tokens[int64_t(b) * n + c];
    p.index[row + node[i]] = c;
  }
  if (thread == 0) {
    p.n_nodes[b] = count;
    p.node_tokens[row] = p.root_tokens[b];
    p.index[row] = -1;
  }
  if (thread >= count && thread < p.nodes) {
    p.node_tokens[row + thread] = 0;
    p.index[row + thread] = -1;
  }
  __syncthreads();
  const int own_parent = thread < p.nodes ? parent_of[thread] : -1;
  if (thread < p.nodes) p.parent[row + thread] = own_parent;
  write_ancestors(*reinterpret_cast<TreeAncestorsShared*>(smem), own_parent, count, p.nodes, p.words,
                  p.ancestors + row * p.words, p.depth + row);
}

}  // namespace tranche
