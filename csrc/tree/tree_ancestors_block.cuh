// Pointer doubling over one tree by one block: after round r a node knows its ancestors up to distance 2^r,
// and points at the next one beyond. A node is one thread.
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

// What the threads of a block share while they find ancestors.
struct TreeAncestorsShared {
  static constexpr int kWords = TreeAncestorsTraits::kSlabWords * TreeAncestorsTraits::kMaxNodes;
  uint64_t bits[kWords];                         // [word][node]: neighbours in a warp are neighbours here
  int32_t jump[TreeAncestorsTraits::kMaxNodes];  // the nearest ancestor not yet in bits, or -1
};

// Called by a whole block whose thread i is node i, with that node's parent (-1 at the root); nodes from
// `count` on are padding. Writes ancestors [nodes, words] and depth [nodes] of one tree.
__device__ __forceinline__ void write_ancestors(TreeAncestorsShared& shared, int parent, int count, int nodes,
                                                int words, int64_t* ancestors, int32_t* depth) {
  constexpr int kSlabWords = TreeAncestorsTraits::kSlabWords;
  constexpr int kMaxNodes = TreeAncestorsTraits::kMaxNodes;
  const int node = int(threadIdx.x);
  const bool in_use = node < count;
  int path_length = 0;
  for (int first = 0; first < words; first += kSlabWords) {
    uint64_t own[kSlabWords];
#pragma unroll
    for (int w = 0; w < kSlabWords; ++w) {
      own[w] = in_use && node / 64 == first + w ? uint64_t(1) << (node % 64) : 0;
    }
    int next = in_use ? parent : -1;
    for (int reach = 1; reach < count; reach *= 2) {
      if (in_use) {
        shared.jump[node] = next;
#pragma unroll
        for (int w = 0; w < kSlabWords; ++w) shared.bits[w * kMaxNodes + node] = own[w];
      }
      __syncthreads();
      if (next >= 0) {
#pragma unroll
        for (int w = 0; w < kSlabWords; ++w) own[w] |= shared.bits[w * kMaxNodes + next];
        next = shared.jump[next];
      }
      __syncthreads();  // before the next round, or slab, overwrites what others read here
    }
    if (node < nodes) {
      int64_t* row = ancestors + int64_t(node) * words;
#pragma unroll
      for (int w = 0; w < kSlabWords; ++w) {
        if (first + w < words) row[first + w] = int64_t(own[w]);
        path_length += __popcll(own[w]);
      }
    }
  }
  if (node < nodes) depth[node] = in_use ? path_length - 1 : 0;
}

}  // namespace tranche
