// One thread takes W elements of a head's first half and the W that rotation pairs with them, of K and of V.
#pragma once

#include "core/launch.cuh"
#include "tree/tree_write_cache.h"

namespace tranche {

constexpr int kWriteCacheThreads = 256;
constexpr int kWriteCacheBlocksPerSm = 4;

// W elements that move as one access.
template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
  T element[W];
};

template <class T, int W>
__device__ __forceinline__ Pack<T, W> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, W>*>(from);
}

template <class T, int W>
__device__ __forceinline__ void store_pack(const Pack<T, W>& pack, T* to) {
  *reinterpret_cast<Pack<T, W>*>(to) = pack;
}

template <class T, int W>
__device__ __forceinline__ void widen(const Pack<T, W>& pack, float (&to)[W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) to[i] = to_float(pack.element[i]);
}

template <class T, int W>
__device__ __forceinline__ Pack<T, W> narrow(const float (&from)[W], const float* scales, int head) {
  const float scale = scales != nullptr ? scales[head] : 1.0f;
  Pack<T, W> pack;
#pragma unroll
  for (int i = 0; i < W; ++i) pack.element[i] = from_float<T>(__fdiv_rn(from[i], scale));
  return pack;
}

// A pack that needs no rotation: moved as it is, or quantised.
template <class T, class Cache, int W>
__device__ __forceinline__ void move_pack(const Pack<T, W>& pack, Cache* to, const float* scales, int head) {
  if constexpr (sizeof(T) == sizeof(Cache)) {
    store_pack<T, W>(pack, to);
  } else {
    float values[W];
    widen(pack, values);
    store_pack(narrow<Cache>(values, scales, head), to);
  }
}

__device__ __forceinline__ float angle(const TreeWriteCacheParams& p, const void* table, int64_t at) {
  switch (p.rope_type) {
    case DType::bf16:
      return to_float(static_cast<const bf16*>(table)[at]);
    case DType::f16:
      return to_float(static_cast<const half*>(table)[at]);
    default:
      return static_cast<const float*>(table)[at];
  }
}

template <int W>
__device__ __forceinline__ void rotate(const TreeWriteCacheParams& p, int64_t at, float (&low)[W],
                                       float (&high)[W]) {
  const int64_t upper = at + (p.rope_width == p.head_dim ? p.head_dim / 2 : 0);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const float x = low[i], y = high[i];
    low[i] = __fsub_rn(__fmul_rn(x, angle(p, p.cos, at + i)), __fmul_rn(y, angle(p, p.sin, at + i)));
    high[i] = __fadd_rn(__fmul_rn(y, angle(p, p.cos, upper + i)), __fmul_rn(x, angle(p, p.sin, upper + i)));
  }
}

// T: of k and v. Cache: T or e4m3. The halves of an odd head differ by one element: W is 1 and the last pair
// has no second element.
template <class T, class Cache, int W>
__global__ void __launch_bounds__(kWriteCacheThreads, kWriteCacheBlocksPerSm)
    tree_write_cache_kernel(TreeWriteCacheParams p) {
  const int64_t b = blockIdx.y;
  const WriteRange range = write_range(p, b);
  const int half_size = p.head_dim / 2, packs = (p.head_dim - half_size + W - 1) / W;
  const int64_t work = int64_t(blockIdx.x) * kWriteCacheThreads + threadIdx.x;
  const int64_t node_and_head = work / packs;
  const int first = int(work % packs) * W;
  if (node_and_head >= int64_t(range.count) * p.heads) return;
  const int32_t node = int32_t(node_and_head / p.heads), head = int32_t(node_and_head % p.heads);
  const int second = p.head_dim - half_size + first;  // the pair's other element
  const bool has_second = second < p.head_dim;

  const T* k = static_cast<const T*>(p.k) + b * p.k_stride[0] + node * p.k_stride[1] + head * p.k_stride[2];
  const T* v = static_cast<const T*>(p.v) + b * p.v_stride[0] + node * p.v_stride[1] + head * p.v_stride[2];
  const SlotPlace place = place_of(p.slots, b, range.first + node);
  Cache* k_to = static_cast<Cache*>(p.k_cache) + place.page * p.k_cache_stride[0] +
                place.slot * p.k_cache_stride[1] + head * p.k_cache_stride[2];
  Cache* v_to = static_cast<Cache*>(p.v_cache) + place.page * p.v_cache_stride[0] +
                place.slot * p.v_cache_stride[1] + head * p.v_cache_stride[2];

  const Pack<T, W> none{};
  const Pack<T, W> k_low = load_pack<T, W>(k + first), v_low = load_pack<T, W>(v + first);
  const Pack<T, W> k_high = has_second ? load_pack<T, W>(k + second) : none;
  const Pack<T, W> v_high = has_second ? load_pack<T, W>(v + second) : none;
  move_pack(v_low, v_to + first, p.v_scale, head);
  if (has_second) move_pack(v_high, v_to + second, p.v_scale, head);
  if (p.cos == nullptr) {
    move_pack(k_low, k_to + first, p.k_scale, head);
    if (has_second) move_pack(k_high, k_to + second, p.k_scale, head);
    return;
  }
  float low[W], high[W];
  widen(k_low, low);
  widen(k_high, high);
  rotate(p, int64_t(rope_row(p, b, node)) * p.rope_width + first, low, high);
  store_pack(narrow<Cache>(low, p.k_scale, head), k_to + first);
  store_pack(narrow<Cache>(high, p.k_scale, head), k_to + second);
}

}  // namespace tranche
