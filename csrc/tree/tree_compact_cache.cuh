// One thread moves one column (16 bytes of one head of one cache tensor) through all rows of the path in
// order, so that no thread ever reads what another writes.
//
// The lengths advance in the same launch although every block reads them: the word that holds a length counts
// its readers in the bits above the capacity's. A block's one access is atomicAdd(word, 1 << bits), which
// returns the length below and the number of earlier readers above; the last reader stores the new length.
#pragma once

#include "core/launch.cuh"
#include "tree/tree_compact_cache.h"

namespace tranche {

struct TreeCompactCacheTraits {
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerSm = 8;
  static constexpr int kInFlight = 4;  // rows read before the first of them is written
};

struct TreeCompactCacheLaunch {
  TreeCompactCacheParams p;
  int32_t length_bits;  // of a word of cache_seqlens: capacity < 2^length_bits
};
static_assert(sizeof(TreeCompactCacheLaunch) <= 4096, "CUDA's limit of kernel parameters");

// The length of sequence b before this launch, the same in all of its blocks.
__device__ __forceinline__ int32_t read_and_advance(const TreeCompactCacheLaunch& launch, int32_t b) {
  const TreeCompactCacheParams& p = launch.p;
  if (!p.advance) return clamped(p.cache_seqlens[b], 0, p.slots.capacity);
  uint32_t* word = reinterpret_cast<uint32_t*>(p.cache_seqlens) + b;
  const uint64_t reader = uint64_t(1) << launch.length_bits;
  const uint32_t seen = atomicAdd(word, uint32_t(reader));
  const int32_t base = clamped(int32_t(seen & uint32_t(reader - 1)), 0, p.slots.capacity);
  const uint32_t earlier_readers = uint32_t(uint64_t(seen) >> launch.length_bits);
  if (earlier_readers == gridDim.y * gridDim.z - 1)
    atomicExch(word, uint32_t(base + moved_rows(p, b, base) + 1));
  return base;
}

template <class Vector>
__global__ void __launch_bounds__(TreeCompactCacheTraits::kThreads, TreeCompactCacheTraits::kBlocksPerSm)
    tree_compact_cache_kernel(TreeCompactCacheLaunch launch) {
  constexpr int kInFlight = TreeCompactCacheTraits::kInFlight;
  const TreeCompactCacheParams& p = launch.p;
  SHARED(int32_t, shared_base, 1);
  const int32_t b = int32_t(blockIdx.x);
  if (threadIdx.x == 0) shared_base[0] = read_and_advance(launch, b);
  __syncthreads();
  const int32_t base = shared_base[0], rows = moved_rows(p, b, base);

  for (int tensor = int(blockIdx.y); tensor < p.tensors; tensor += int(gridDim.y)) {
    const CompactLayout& layout = p.layouts[p.layout_of[tensor]];
    const int vectors = layout.row_bytes / int(sizeof(Vector));
    for (int column = int(blockIdx.z * blockDim.x + threadIdx.x); column < layout.heads * vectors;
         column += int(gridDim.z * blockDim.x)) {
      char* address = static_cast<char*>(p.caches[tensor]) + (column / vectors) * layout.stride[2] +
                      (column % vectors) * int64_t(sizeof(Vector));
      const auto row = [&](int32_t slot) {
        const SlotPlace place = place_of(p.slots, b, base + slot);
        return reinterpret_cast<Vector*>(address + place.page * layout.stride[0] +
                                         place.slot * layout.stride[1]);
      };
      for (int first = 1; first <= rows; first += kInFlight) {
        Vector held[kInFlight];
        bool moves[kInFlight];  // a row that stays is not touched: its page may be another sequence's as well
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          const int32_t j = first + i, node = j <= rows ? source_node(p, b, base, j) : j;
          moves[i] = node != j;
          if (moves[i]) held[i] = *row(node);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (moves[i]) *row(first + i) = held[i];
        }
      }
    }
  }
}

}  // namespace tranche
