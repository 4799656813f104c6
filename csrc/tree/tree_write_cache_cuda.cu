#include "tree/tree_write_cache.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {
namespace {

bool aligned(const void* pointer, const int64_t (&strides)[3], int64_t element_bytes, int64_t elements) {
  bool fits = reinterpret_cast<uintptr_t>(pointer) % uint64_t(element_bytes * elements) == 0;
  for (int64_t stride : strides) fits = fits && stride % elements == 0;
  return fits;
}

template <class T, class Cache, int W>
void launch_kernel(const TreeWriteCacheParams& p, void* stream) {
  const int packs = (p.head_dim - p.head_dim / 2 + W - 1) / W;
  const int64_t threads = int64_t(p.nodes) * p.heads * packs;
  const dim3 grid{unsigned((threads + kWriteCacheThreads - 1) / kWriteCacheThreads), unsigned(p.batch)};
  launch("tree_write_cache_", tree_write_cache_kernel<T, Cache, W>, {grid, dim3(kWriteCacheThreads)}, stream,
         p);
}

template <class T, class Cache>
void any_alignment(const TreeWriteCacheParams& p, void* stream) {
  constexpr int kWide = 16 / int(sizeof(T));
  const bool wide = p.head_dim % (2 * kWide) == 0 && aligned(p.k, p.k_stride, sizeof(T), kWide) &&
                    aligned(p.v, p.v_stride, sizeof(T), kWide) &&
                    aligned(p.k_cache, p.k_cache_stride, sizeof(Cache), kWide) &&
                    aligned(p.v_cache, p.v_cache_stride, sizeof(Cache), kWide);
  if (wide) return launch_kernel<T, Cache, kWide>(p, stream);
  launch_kernel<T, Cache, 1>(p, stream);
}

template <class T>
void any_cache(const TreeWriteCacheParams& p, void* stream) {
  if (p.cache_type == DType::e4m3) return any_alignment<T, e4m3>(p, stream);
  any_alignment<T, T>(p, stream);
}

}  // namespace

void tree_write_cache_(const TreeWriteCacheParams& p, void* stream) {
  if (p.batch == 0 || p.nodes == 0 || p.heads == 0 || p.head_dim == 0) return;
  with_type<float, half, bf16>("tree_write_cache_", p.type,
                               [&](auto t) { any_cache<decltype(t)>(p, stream); });
}

}  // namespace tranche::cuda
