#include "tree/tree_compact_cache.cuh"

namespace tranche::cuda {
namespace {

using Kernel = void (*)(TreeCompactCacheLaunch);

Kernel kernel_for(int vector_bytes) {
  switch (vector_bytes) {
    case 16:
      return tree_compact_cache_kernel<uint4>;
    case 8:
      return tree_compact_cache_kernel<uint2>;
    case 4:
      return tree_compact_cache_kernel<uint32_t>;
    case 2:
      return tree_compact_cache_kernel<uint16_t>;
    default:
      return tree_compact_cache_kernel<uint8_t>;
  }
}

}  // namespace

void tree_compact_cache_(const TreeCompactCacheParams& p, void* stream) {
  if (p.batch == 0 || p.nodes == 0) return;
  constexpr int kThreads = TreeCompactCacheTraits::kThreads;
  int columns = 1;
  for (int i = 0; i < p.tensors; ++i) {
    const CompactLayout& layout = p.layouts[p.layout_of[i]];
    const int own = layout.heads * (layout.row_bytes / p.vector_bytes);
    columns = own > columns ? own : columns;
  }
  TreeCompactCacheLaunch arguments{p, 1};
  while ((int64_t(1) << arguments.length_bits) <= p.slots.capacity) ++arguments.length_bits;
  // A word has room for this many readers above the length; only caches of over 2^21 slots come near it.
  const int64_t readers = int64_t(1) << (32 - arguments.length_bits);
  const int64_t tensors = p.tensors < readers ? p.tensors : readers;
  int64_t parts = (columns + kThreads - 1) / kThreads;
  parts = parts < readers / tensors ? parts : readers / tensors;
  const dim3 grid{unsigned(p.batch), unsigned(tensors), unsigned(parts)};
  launch("tree_compact_cache_", kernel_for(p.vector_bytes), {grid, dim3(kThreads)}, stream, arguments);
}

}  // namespace tranche::cuda
