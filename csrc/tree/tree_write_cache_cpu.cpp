// A node is a task. Rows that need no arithmetic are copied; the others pass through a row of floats
// (doubles).
#include <cstring>

#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "tree/tree_write_cache.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

constexpr int kPiece = 256;  // pairs handled at a time, so that heads of any size fit the stack

template <class T>
TRANCHE_INLINE void widen(const T* from, float* to, int n) {
  row_to_float(from, to, n);
}
TRANCHE_INLINE void widen(const float* from, double* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = from[i];
}
TRANCHE_INLINE void widen(const double* from, double* to, int n) {
  memcpy(to, from, size_t(n) * sizeof(double));
}

template <class Cache, class Compute>
TRANCHE_INLINE void narrow(const Compute* from, Cache* to, int n, float scale) {
  if constexpr (sizeof(Compute) == 8) {
    for (int i = 0; i < n; ++i) to[i] = Cache(from[i]);
  } else {
    for (int i = 0; i < n; ++i) to[i] = from_float<Cache>(from[i] / scale);
  }
}

template <class Compute>
TRANCHE_INLINE void load_angles(const TreeWriteCacheParams& p, const void* table, int64_t at, Compute* to,
                                int n) {
  if (p.rope_type == DType::f32) return widen(static_cast<const float*>(table) + at, to, n);
  if constexpr (sizeof(Compute) == 8) {
    widen(static_cast<const double*>(table) + at, to, n);
  } else if (p.rope_type == DType::bf16) {
    widen(static_cast<const bf16*>(table) + at, to, n);
  } else {
    widen(static_cast<const half*>(table) + at, to, n);
  }
}

// One head of one node. `row` is the tables' row, or negative for no rotation.
template <class T, class Cache, class Compute>
void one_row(const TreeWriteCacheParams& p, const T* from, Cache* to, int64_t row, float scale) {
  const int half_size = p.head_dim / 2;
  Compute low[kPiece], high[kPiece], cosine[kPiece], sine[kPiece], turned[kPiece];
  if (row < 0) {
    for (int first = 0; first < p.head_dim; first += kPiece) {
      const int n = p.head_dim - first < kPiece ? p.head_dim - first : kPiece;
      widen(from + first, low, n);
      narrow(low, to + first, n, scale);
    }
    return;
  }
  const int64_t upper = p.rope_width == p.head_dim ? half_size : 0;  // where the second half's angles begin
  for (int first = 0; first < half_size; first += kPiece) {
    const int n = half_size - first < kPiece ? half_size - first : kPiece;
    const int64_t at = row * p.rope_width + first;
    widen(from + first, low, n);
    widen(from + half_size + first, high, n);
    load_angles(p, p.cos, at, cosine, n);
    load_angles(p, p.sin, at, sine, n);
    for (int i = 0; i < n; ++i) turned[i] = low[i] * cosine[i] - high[i] * sine[i];
    narrow(turned, to + first, n, scale);
    if (upper != 0) {
      load_angles(p, p.cos, at + upper, cosine, n);
      load_angles(p, p.sin, at + upper, sine, n);
    }
    for (int i = 0; i < n; ++i) turned[i] = high[i] * cosine[i] + low[i] * sine[i];
    narrow(turned, to + half_size + first, n, scale);
  }
}

template <class T, class Cache, class Compute>
void one_node(const TreeWriteCacheParams& p, int64_t b, int32_t node) {
  const WriteRange range = write_range(p, b);
  if (node >= range.count) return;
  const SlotPlace place = place_of(p.slots, b, range.first + node);
  const int64_t row = p.cos != nullptr ? rope_row(p, b, node) : -1;
  constexpr bool kSameType = sizeof(T) == sizeof(Cache);
  for (int64_t h = 0; h < p.heads; ++h) {
    const T* k = static_cast<const T*>(p.k) + b * p.k_stride[0] + node * p.k_stride[1] + h * p.k_stride[2];
    const T* v = static_cast<const T*>(p.v) + b * p.v_stride[0] + node * p.v_stride[1] + h * p.v_stride[2];
    Cache* k_to = static_cast<Cache*>(p.k_cache) + place.page * p.k_cache_stride[0] +
                  place.slot * p.k_cache_stride[1] + h * p.k_cache_stride[2];
    Cache* v_to = static_cast<Cache*>(p.v_cache) + place.page * p.v_cache_stride[0] +
                  place.slot * p.v_cache_stride[1] + h * p.v_cache_stride[2];
    if (kSameType && row < 0) {
      memcpy(k_to, k, size_t(p.head_dim) * sizeof(T));
    } else {
      one_row<T, Cache, Compute>(p, k, k_to, row, p.k_scale != nullptr ? p.k_scale[h] : 1.0f);
    }
    if (kSameType) {
      memcpy(v_to, v, size_t(p.head_dim) * sizeof(T));
    } else {
      one_row<T, Cache, Compute>(p, v, v_to, -1, p.v_scale != nullptr ? p.v_scale[h] : 1.0f);
    }
  }
}

template <class T, class Cache, class Compute>
void all_nodes(const TreeWriteCacheParams& p) {
  const int64_t tasks = int64_t(p.batch) * p.nodes;
  const auto task = [&](int64_t i) { one_node<T, Cache, Compute>(p, i / p.nodes, int32_t(i % p.nodes)); };
  const bool worth_threads = tasks * p.heads * p.head_dim >= 32768;
  if (worth_threads) {
    parallel_for(tasks, task);
  } else {
    for (int64_t i = 0; i < tasks; ++i) task(i);
  }
}

}  // namespace

void tree_write_cache_(const TreeWriteCacheParams& p) {
  with_type<double, float, half, bf16>("tree_write_cache_", p.type, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) < 8) {
      if (p.cache_type == DType::e4m3) return all_nodes<T, e4m3, float>(p);
    }
    all_nodes<T, T, typename compute_type<T>::type>(p);
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, tree_write_cache_, TreeWriteCacheParams)
