// What the kernels of tree_attention's backward pass share: a tile of rows against a tile of slots in shared
// memory, and products of such tiles.
//
// Half and bf16 tiles are 64 x 64 and multiply by mma; fp32 tiles are 32 x 32 and multiply by fma, in the
// register layout of mma: a thread of group g = lane / 4 and place t = lane % 4 holds rows g and g + 8 of
// columns 2t, 2t + 1.
#pragma once

#include "core/launch.cuh"
#include "core/ptx.cuh"
#include "tree/tree_attention_backward.h"
#include "tree/tree_visibility.h"

namespace tranche {

// Weights of a row are share * exp(s - top); shift = grad_lse - sink_weight * delta.
struct BackwardRow {
  float top, share, sink_weight, shift;
};

// One launch, planned on the host.
struct TreeAttentionBackwardLaunch {
  TreeAttentionBackwardParams b;
  BackwardRow* rows;  // [B, N, Hq]
  int32_t* broken;    // [B, N, Hq]
  float *slot_k,
      *slot_v;  // [B, capacity, Hkv, D] under a block table: gradients by slot, before pages are summed
  int32_t group, rows_per_head, row_tiles, key_tiles;
  bool aligned;  // rows may be loaded four elements at a time
};

template <class T, int kDim_>
struct BackwardTraits {
  static constexpr int kDim = kDim_;
  static constexpr int kTile = sizeof(T) == 4 ? 32 : 64;
  static constexpr int kStrips = kTile / 16;         // of 16 rows
  static constexpr int kThreads = 32 * 2 * kStrips;  // two warps per strip
  static constexpr int kPitch = kDim + 16 / int(sizeof(T));
  static constexpr int kScorePitch = kTile + 16 / int(sizeof(T));
  static constexpr size_t kSmem = sizeof(T) * kTile * (4 * kPitch + 2 * kScorePitch) +
                                  kTile * (sizeof(BackwardRow) + sizeof(uint64_t) + 2 * sizeof(int32_t));
  static_assert(kDim % 64 == 0 && kSmem <= 163 * 1024, "shared memory of sm_80");
};

// ---- products

// sum += left right, for 16 rows and 8 kN columns. Memory rows of `left` are its rows, or with kLeftDown its
// depth; memory rows of `right` are its columns, or with kRightDown its depth.
template <bool kLeftDown, bool kRightDown, class T, int kN>
__device__ __forceinline__ void product(float (&sum)[kN][4], const T* left, int left_pitch, const T* right,
                                        int right_pitch, int depth) {
  const int lane = int(threadIdx.x % 32), i = lane % 8, j = lane / 8;
  static_assert(kN % 2 == 0);
  for (int k = 0; k < depth; k += 16) {
    uint32_t a[4];
    if constexpr (kLeftDown) {
      ptx::ldmatrix_x4_trans(a, left + (k + j / 2 * 8 + i) * left_pitch + j % 2 * 8);
    } else {
      ptx::ldmatrix_x4(a, left + (j % 2 * 8 + i) * left_pitch + k + j / 2 * 8);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      if constexpr (kRightDown) {
        ptx::ldmatrix_x4_trans(b, right + (k + j % 2 * 8 + i) * right_pitch + (n + j / 2) * 8);
      } else {
        ptx::ldmatrix_x4(b, right + ((n + j / 2) * 8 + i) * right_pitch + k + j % 2 * 8);
      }
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
      ptx::mma_m16n8k16<T>(sum[n], a, first);
      ptx::mma_m16n8k16<T>(sum[n + 1], a, second);
    }
  }
}

// In fp32, at most 64 products are summed in a row before they join `sum`.
template <bool kLeftDown, bool kRightDown, int kN>
__device__ __forceinline__ void product(float (&sum)[kN][4], const float* left, int left_pitch,
                                        const float* right, int right_pitch, int depth) {
  constexpr int kColumns = kN < 4 ? kN : 4;
  const int lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  for (int first = 0; first < depth; first += 64) {
    const int end = depth - first < 64 ? depth : first + 64;
#pragma unroll
    for (int n0 = 0; n0 < kN; n0 += kColumns) {
      float part[kColumns][4] = {};
#pragma unroll 2
      for (int k = first; k < end; ++k) {
        const float a0 = kLeftDown ? left[k * left_pitch + g] : left[g * left_pitch + k];
        const float a1 = kLeftDown ? left[k * left_pitch + g + 8] : left[(g + 8) * left_pitch + k];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const int column = (n0 + n) * 8 + 2 * t;
          const float b0 = kRightDown ? right[k * right_pitch + column] : right[column * right_pitch + k];
          const float b1 =
              kRightDown ? right[k * right_pitch + column + 1] : right[(column + 1) * right_pitch + k];
          part[n][0] = fmaf(a0, b0, part[n][0]);
          part[n][1] = fmaf(a0, b1, part[n][1]);
          part[n][2] = fmaf(a1, b0, part[n][2]);
          part[n][3] = fmaf(a1, b1, part[n][3]);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[n0 + n][c] += part[n][c];
      }
    }
  }
}

// ---- a tile

// Four neighbours of a row, to shared memory; false if one is not finite.
template <class T>
__device__ __forceinline__ bool copy_four(T* to, const T* from, bool aligned) {
  struct alignas(4 * sizeof(T)) Four {
    T x[4];
  };
  Four four;
  if (aligned) {
    four = *reinterpret_cast<const Four*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) four.x[i] = from[i];
  }
  float zero = 0.0f;  // x - x is 0, or NaN
#pragma unroll
  for (int i = 0; i < 4; ++i) zero += to_float(four.x[i]) - to_float(four.x[i]);
  *reinterpret_cast<Four*>(to) = four;
  return zero == 0.0f;
}

template <class Traits, class T>
struct BackwardTile {
  static constexpr int kTile = Traits::kTile, kPitch = Traits::kPitch, kScorePitch = Traits::kScorePitch;
  static constexpr int kKeyColumns = Traits::kStrips;  // of 8 slots, in a warp's half of the scores

  const TreeAttentionBackwardLaunch& launch;
  const TreeAttentionParams& p;
  int b, head, nodes, length;
  int strip, side;           // of the warp
  T *q, *grad_out, *k, *v;   // [kTile, kPitch]
  T *weights, *gradients;    // [kTile rows, kScorePitch]
  uint64_t* visible;         // [kTile] rows
  BackwardRow* rows;         // [kTile]
  int32_t *broken, *finite;  // [kTile] rows; [kTile] slots

  __device__ __forceinline__ BackwardTile(const TreeAttentionBackwardLaunch& plan, int pair)
      : launch(plan), p(plan.b.forward), b(pair / p.heads_kv), head(pair % p.heads_kv) {
    nodes = slots::node_count(p, b);
    length = slots::committed(p, b, nodes);
    strip = int(threadIdx.x / 32) % Traits::kStrips;
    side = int(threadIdx.x / 32) / Traits::kStrips;
    q = dynamic_smem<T>();
    grad_out = q + kTile * kPitch;
    k = grad_out + kTile * kPitch;
    v = k + kTile * kPitch;
    weights = v + kTile * kPitch;
    gradients = weights + kTile * kScorePitch;
    visible = reinterpret_cast<uint64_t*>(gradients + kTile * kScorePitch);
    rows = reinterpret_cast<BackwardRow*>(visible + kTile);
    broken = reinterpret_cast<int32_t*>(rows + kTile);
    finite = broken + kTile;
  }

  __device__ __forceinline__ int end() const { return length + nodes; }
  __device__ __forceinline__ bool in_use(int row) const { return row < nodes * launch.group; }
  // Of [B, N, Hq].
  __device__ __forceinline__ int64_t row_index(int row) const {
    return (int64_t(b) * p.nodes + row / launch.group) * p.heads_q + head * launch.group + row % launch.group;
  }

  // One memory row per warp and step; `from` is null for rows that are not there. Returns whether it is all
  // finite; if not, it becomes zeros.
  __device__ __forceinline__ bool copy_row(T* to, const T* from) const {
    bool good = true;
    const int lane = int(threadIdx.x % 32);
    for (int d = lane * 4; d < Traits::kDim; d += 128) {
      if (from != nullptr && d < p.head_dim) {
        good = copy_four(to + d, from + d, launch.aligned) && good;
      } else {
        for (int i = 0; i < 4; ++i) to[d + i] = from_float<T>(0.0f);
      }
    }
    if (__all_sync(0xffffffffu, good)) return true;
    for (int d = lane * 4; d < Traits::kDim; d += 128) {
      for (int i = 0; i < 4; ++i) to[d + i] = from_float<T>(0.0f);
    }
    return false;
  }

  __device__ __forceinline__ void load_rows(int first) const {
    for (int r = int(threadIdx.x / 32); r < kTile; r += Traits::kThreads / 32) {
      const int row = first + r;
      const bool there = in_use(row) && launch.broken[row_index(row)] == 0;
      const T* q_row = static_cast<const T*>(p.q) + b * p.q_stride[0] + row / launch.group * p.q_stride[1] +
                       (head * launch.group + row % launch.group) * p.q_stride[2];
      copy_row(q + r * kPitch, there ? q_row : nullptr);
      copy_row(grad_out + r * kPitch,
               there ? static_cast<const T*>(launch.b.grad_out) + row_index(row) * p.head_dim : nullptr);
    }
    const int r = int(threadIdx.x);
    if (r < kTile) {
      rows[r] = in_use(first + r) ? launch.rows[row_index(first + r)] : BackwardRow{0.0f, 0.0f, 0.0f, 0.0f};
      broken[r] = in_use(first + r) ? launch.broken[row_index(first + r)] : 0;
    }
  }

  __device__ __forceinline__ void load_slots(int first) const {
    for (int x = int(threadIdx.x / 32); x < kTile; x += Traits::kThreads / 32) {
      const bool there = first + x < end();
      const int64_t row = there ? slots::cache_row(p, b, first + x) : 0;
      const T* k_row = static_cast<const T*>(p.k_cache) + slots::cache_offset(p, p.k_stride, row, head);
      const T* v_row = static_cast<const T*>(p.v_cache) + slots::cache_offset(p, p.v_stride, row, head);
      const bool good = copy_row(k + x * kPitch, there ? k_row : nullptr);
      copy_row(v + x * kPitch, there ? v_row : nullptr);
      if (threadIdx.x % 32 == 0) finite[x] = there && good;
    }
  }

  // What the rows from `row` on see of the slots from `slot` on. Returns whether anything is seen; a barrier,
  // after which the tiles may be loaded anew.
  __device__ __forceinline__ bool see(int row, int slot) const {
    uint64_t bits = 0;
    const int r = int(threadIdx.x);
    if (r < kTile) {
      if (in_use(row + r)) bits = slots::visible(p, b, length, (row + r) / launch.group, slot);
      bits &= slots::low_bits(kTile);
      visible[r] = bits;
    }
    return __syncthreads_or(bits != 0) != 0;
  }

  __device__ __forceinline__ float score_of(float product, float& slope) const {
    slope = 1.0f;
    if (p.softcap == 0.0f) return product * p.scale;
    const float t = tanhf(product * (p.scale / p.softcap));
    slope = fmaf(-t, t, 1.0f);
    return t * p.softcap;
  }

  // <q, k> and <grad_out, v> of the warp's strip of rows and half of the slots.
  __device__ __forceinline__ void multiply(float (&s)[kKeyColumns][4], float (&g)[kKeyColumns][4]) const {
    const int row = strip * 16, slot = side * (kTile / 2);
    product<false, false>(s, q + row * kPitch, kPitch, k + slot * kPitch, kPitch, p.head_dim);
    product<false, false>(g, grad_out + row * kPitch, kPitch, v + slot * kPitch, kPitch, p.head_dim);
  }

  // f(row, slot, <q, k>, <grad_out, v>, visible) gives what weights and gradients hold at [row][slot].
  template <class F>
  __device__ __forceinline__ void fill(const F& f) const {
    float s[kKeyColumns][4] = {}, g[kKeyColumns][4] = {};
    multiply(s, g);
    const int lane = int(threadIdx.x % 32);
#pragma unroll
    for (int n = 0; n < kKeyColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = strip * 16 + lane / 4 + c / 2 * 8,
                  slot = side * (kTile / 2) + n * 8 + lane % 4 * 2 + c % 2;
        const bool sees = (visible[row] >> slot & 1) != 0 && finite[slot] != 0;
        f(rows[row], sees, s[n][c], g[n][c]);
        weights[row * kScorePitch + slot] = from_float<T>(s[n][c]);
        gradients[row * kScorePitch + slot] = from_float<T>(g[n][c]);
      }
    }
  }

  // weights = p w, gradients = grad_x.
  __device__ __forceinline__ void differentiate() const {
    fill([&](const BackwardRow& row, bool sees, float& s, float& g) {
      float slope;
      const float e = row.share * expf(score_of(s, slope) - row.top);
      s = sees ? e * row.sink_weight : 0.0f;
      g = sees ? e * fmaf(row.sink_weight, g, row.shift) * slope : 0.0f;
    });
  }
};

}  // namespace tranche
