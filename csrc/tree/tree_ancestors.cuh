// Pointer doubling over one tree per block: after round r a node knows its ancestors up to distance 2^r, and
// points at the next one beyond. A node is one thread.
//
// The bits of 1024 nodes are 128 KB, more than a block may have everywhere, so they are built a slab of
// kSlabWords words at a time; trees of up to 256 nodes need one slab.
#pragma once

#include "core/launch.cuh"
#include "tree/tree_ancestors.h"

namespace tranche {

struct TreeAncestorsTraits {
  static constexpr int kMaxNodes = kMaxTreeNodes;
  static constexpr int kSlabWords = 4;
  static_assert(kMaxNodes <= 1024, "a node is a thread");
  static_assert(kMaxNodes * (kSlabWords * sizeof(uint64_t) + sizeof(int32_t)) <= 48 * 1024,
                "static shared memory");
};

__global__ void __launch_bounds__(TreeAncestorsTraits::kMaxNodes)
    tree_ancestors_kernel(TreeAncestorsParams p) {
  constexpr int kSlabWords = TreeAncestorsTraits::kSlabWords;
  constexpr int kMaxNodes = TreeAncestorsTraits::kMaxNodes;
  SHARED(uint64_t, bits, kSlabWords* kMaxNodes);  // [word][node]: neighbours in a warp are neighbours here
  SHARED(int32_t, jump, kMaxNodes);               // the nearest ancestor not yet in bits, or -1

  const int b = int(blockIdx.x), node = int(threadIdx.x);
  const int count = p.n_nodes[b] < 0 ? 0 : (p.n_nodes[b] > p.nodes ? p.nodes : p.n_nodes[b]);
  const bool in_use = node < count;

  int parent = -1;
  if (in_use && node > 0) {
    parent = p.parent[b * p.parent_stride + node];
    if (parent < 0 || parent >= node) parent = 0;
  }

  int path_length = 0;
  for (int first = 0; first < p.words; first += kSlabWords) {
    uint64_t own[kSlabWords];
#pragma unroll
    for (int w = 0; w < kSlabWords; ++w) {
      own[w] = in_use && node / 64 == first + w ? uint64_t(1) << (node % 64) : 0;
    }
    int next = parent;
    for (int reach = 1; reach < count; reach *= 2) {
      if (in_use) {
        jump[node] = next;
#pragma unroll
        for (int w = 0; w < kSlabWords; ++w) bits[w * kMaxNodes + node] = own[w];
      }
      __syncthreads();
      if (next >= 0) {
#pragma unroll
        for (int w = 0; w < kSlabWords; ++w) own[w] |= bits[w * kMaxNodes + next];
        next = jump[next];
      }
      __syncthreads();  // before the next round, or slab, overwrites what others read here
    }
    if (node < p.nodes) {
      int64_t* row = p.ancestors + (int64_t(b) * p.nodes + node) * p.words;
#pragma unroll
      for (int w = 0; w < kSlabWords; ++w) {
        if (first + w < p.words) row[first + w] = int64_t(own[w]);
        path_length += __popcll(own[w]);
      }
    }
  }
  if (node < p.nodes) p.depth[int64_t(b) * p.nodes + node] = in_use ? path_length - 1 : 0;
}

}  // namespace tranche
