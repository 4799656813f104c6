// The kernels of tree_attention's backward pass, in the order of their launch. No two blocks write one
// element, and every sum has a fixed order.
//
//   prepare  a warp per row: <grad_out, out>, and whether the row is broken
//   sums     fp32 only, a block per tile of rows: largest score, sum of weights and delta, found again from
//   the very
//            products that become gradients (the rounding of lse and out would be the largest error by far)
//   query    a block per tile of rows walks the slots: grad_q
//   cache    a block per tile of slots walks the rows: grad_k, grad_v; half of the warps each
//   pages    under a block table, a block per page and head sums what its sequences left
#pragma once

#include "tree/tree_attention_backward_tile.cuh"

namespace tranche {

constexpr int kBackwardThreads = 128;  // of prepare and pages

template <class T>
__global__ void __launch_bounds__(kBackwardThreads)
    tree_attention_prepare_kernel(TreeAttentionBackwardLaunch plan) {
  const TreeAttentionParams& p = plan.b.forward;
  const int64_t row = int64_t(blockIdx.x) * (kBackwardThreads / 32) + threadIdx.x / 32;
  const int lane = int(threadIdx.x % 32);
  if (row >= int64_t(p.batch) * p.nodes * p.heads_q) return;
  const int head = int(row % p.heads_q), node = int(row / p.heads_q % p.nodes),
            b = int(row / p.heads_q / p.nodes);
  const float infinity = __builtin_inff();

  BackwardRow state = {0.0f, 0.0f, 0.0f, 0.0f};
  bool broken = false;
  const float lse = p.lse[row];
  if (node < slots::node_count(p, b) && lse != -infinity) {
    const T* q = static_cast<const T*>(p.q) + b * p.q_stride[0] + node * p.q_stride[1] + head * p.q_stride[2];
    const T* out = static_cast<const T*>(p.out) + row * p.head_dim;
    const T* grad_out = static_cast<const T*>(plan.b.grad_out) + row * p.head_dim;
    float delta = 0.0f, zero = 0.0f;
    for (int d = lane; d < p.head_dim; d += 32) {
      const float g = to_float(grad_out[d]), x = to_float(q[d]);
      delta = fmaf(g, to_float(out[d]), delta);
      zero += (g - g) + (x - x);
    }
    for (int step = 16; step > 0; step /= 2) {
      delta += __shfl_xor_sync(0xffffffffu, delta, step);
      zero += __shfl_xor_sync(0xffffffffu, zero, step);
    }
    const float weight = p.sinks ? 1.0f / (1.0f + expf(p.sinks[head] - lse)) : 1.0f;
    const float shift = (plan.b.grad_lse ? plan.b.grad_lse[row] : 0.0f) - weight * delta;
    broken = zero != 0.0f || lse - lse != 0.0f || shift - shift != 0.0f;
    if (!broken) state = {lse, 1.0f, weight, shift};
  }
  if (lane == 0) {
    plan.rows[row] = state;
    plan.broken[row] = broken;
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    tree_attention_sums_kernel(TreeAttentionBackwardLaunch plan) {
  constexpr int kTile = Traits::kTile;
  const BackwardTile<Traits, float> tile(plan, int(blockIdx.x) / plan.row_tiles);
  const int first = int(blockIdx.x) % plan.row_tiles * kTile, r = int(threadIdx.x);
  if (!tile.in_use(first)) return;
  tile.load_rows(first);
  const float lowest = -__builtin_inff();
  float top = lowest, sum = 0.0f, weighted = 0.0f;  // of row r
  for (int slot = 0; slot < tile.end(); slot += kTile) {
    if (!tile.see(first, slot)) continue;
    tile.load_slots(slot);
    __syncthreads();
    tile.fill([&](const BackwardRow&, bool sees, float& s, float&) {
      float slope;
      s = sees ? tile.score_of(s, slope) : lowest;
    });
    __syncthreads();
    if (r < kTile) {
      const float *s = tile.weights + r * Traits::kScorePitch, *g = tile.gradients + r * Traits::kScorePitch;
      float new_top = top;
#pragma unroll 4
      for (int x = 0; x < kTile; ++x) new_top = fmaxf(new_top, s[x]);
      if (new_top > lowest) {
        const float alpha = expf(top - new_top);
        float part = 0.0f, weighted_part = 0.0f;
#pragma unroll 4
        for (int x = 0; x < kTile; ++x) {
          const float e = expf(s[x] - new_top);
          part += e;
          weighted_part = s[x] > lowest ? fmaf(e, g[x], weighted_part) : weighted_part;
        }
        sum = fmaf(sum, alpha, part);
        weighted = fmaf(weighted, alpha, weighted_part);
        top = new_top;
      }
    }
  }
  __syncthreads();
  if (r < kTile && tile.in_use(first + r) && tile.broken[r] == 0 && sum > 0.0f) {
    const int64_t row = tile.row_index(first + r);
    const TreeAttentionParams& p = plan.b.forward;
    const float lse = top + logf(sum);
    const float weight = p.sinks ? 1.0f / (1.0f + expf(p.sinks[row % p.heads_q] - lse)) : 1.0f;
    const float grad_lse = plan.b.grad_lse ? plan.b.grad_lse[row] : 0.0f;
    plan.rows[row] = {top, 1.0f / sum, weight, grad_lse - weight * weight * (weighted / sum)};
  }
}

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    tree_attention_grad_query_kernel(TreeAttentionBackwardLaunch plan) {
  constexpr int kTile = Traits::kTile, kColumns = Traits::kDim / 16;
  const BackwardTile<Traits, T> tile(plan, int(blockIdx.x) / plan.row_tiles);
  const TreeAttentionParams& p = tile.p;
  const int first = int(blockIdx.x) % plan.row_tiles * kTile, half = tile.side * (Traits::kDim / 2);
  float sum[kColumns][4] = {};
  tile.load_rows(first);
  const int end = tile.in_use(first) ? tile.end() : 0;
  for (int slot = 0; slot < end; slot += kTile) {
    if (!tile.see(first, slot)) continue;
    tile.load_slots(slot);
    __syncthreads();
    tile.differentiate();
    __syncthreads();
    product<false, true>(sum, tile.gradients + tile.strip * 16 * Traits::kScorePitch, Traits::kScorePitch,
                         tile.k + half, Traits::kPitch, kTile);
  }
  __syncthreads();  // broken was written by other threads
  const int lane = int(threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int r = tile.strip * 16 + lane / 4 + c / 2 * 8, d = half + n * 8 + lane % 4 * 2 + c % 2;
      if (first + r >= plan.rows_per_head || d >= p.head_dim) continue;
      const float x = tile.broken[r] ? bits_float(0x7fffffffu) : p.scale * sum[n][c];
      static_cast<T*>(plan.b.grad_q)[tile.row_index(first + r) * p.head_dim + d] = from_float<T>(x);
    }
  }
}

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    tree_attention_grad_cache_kernel(TreeAttentionBackwardLaunch plan) {
  constexpr int kTile = Traits::kTile, kColumns = Traits::kDim / 8;
  SHARED(int32_t, poisoned, kTile);
  const BackwardTile<Traits, T> tile(plan, int(blockIdx.x) / plan.key_tiles);
  const TreeAttentionParams& p = tile.p;
  const int first = int(blockIdx.x) % plan.key_tiles * kTile, x = int(threadIdx.x);
  const bool is_value = tile.side == 0;
  float sum[kColumns][4] = {};
  bool poison = false;  // of slot first + x
  if (first < tile.end()) {
    tile.load_slots(first);
    for (int row = 0; tile.in_use(row); row += kTile) {
      if (!tile.see(row, first)) continue;
      tile.load_rows(row);
      __syncthreads();
      tile.differentiate();
      if (x < kTile) {
        for (int r = 0; r < kTile; ++r)
          poison = poison || (tile.broken[r] != 0 && (tile.visible[r] >> x & 1) != 0);
      }
      __syncthreads();
      product<true, true>(sum, (is_value ? tile.weights : tile.gradients) + tile.strip * 16,
                          Traits::kScorePitch, is_value ? tile.grad_out : tile.q, Traits::kPitch, kTile);
    }
  }
  if (x < kTile) poisoned[x] = poison;
  __syncthreads();
  const bool by_slot = plan.slot_k != nullptr;
  const int end = by_slot ? tile.end() : p.capacity, lane = int(threadIdx.x % 32);
  const float scale = is_value ? 1.0f : p.scale;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int slot = tile.strip * 16 + lane / 4 + c / 2 * 8, d = n * 8 + lane % 4 * 2 + c % 2;
      if (first + slot >= end || d >= p.head_dim) continue;
      const float value = poisoned[slot] ? bits_float(0x7fffffffu) : scale * sum[n][c];
      const int64_t at =
          ((int64_t(tile.b) * p.capacity + first + slot) * p.heads_kv + tile.head) * p.head_dim + d;
      if (by_slot) {
        (is_value ? plan.slot_v : plan.slot_k)[at] = value;
      } else {
        static_cast<T*>(is_value ? plan.b.grad_v : plan.b.grad_k)[at] = from_float<T>(value);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBackwardThreads)
    tree_attention_pages_kernel(TreeAttentionBackwardLaunch plan) {
  constexpr int kEach = 8;  // elements of a thread
  SHARED(int32_t, matches,
         kBackwardThreads);  // of 128 entries of the table: used slots, if it is this page, else 0
  const TreeAttentionParams& p = plan.b.forward;
  const int page = int(blockIdx.x / p.heads_kv), head = int(blockIdx.x % p.heads_kv),
            thread = int(threadIdx.x);
  const int columns = p.capacity / p.page_size;
  const int64_t entries = int64_t(p.batch) * columns, elements = int64_t(p.page_size) * p.head_dim;

  for (int64_t base = 0; base < elements; base += kEach * kBackwardThreads) {
    float k[kEach] = {}, v[kEach] = {};
    for (int64_t first = 0; first < entries; first += kBackwardThreads) {
      int used = 0;
      if (first + thread < entries) {
        const int b = int((first + thread) / columns), column = int((first + thread) % columns);
        const int nodes = slots::node_count(p, b), end = slots::committed(p, b, nodes) + nodes;
        const int entry =
            end > column * p.page_size
                ? slots::clamp(p.block_table[b * p.block_table_stride + column], 0, p.num_pages - 1)
                : -1;
        if (entry == page) used = end - column * p.page_size;
      }
      matches[thread] = used;
      if (__syncthreads_or(used != 0) != 0) {
        for (int m = 0; m < kBackwardThreads; ++m) {
          if (matches[m] == 0) continue;
          const int64_t b = (first + m) / columns, slot = (first + m) % columns * p.page_size;
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            const int64_t element = base + e * kBackwardThreads + thread, offset = element / p.head_dim;
            if (element >= elements || offset >= matches[m]) continue;
            const int64_t at =
                ((b * p.capacity + slot + offset) * p.heads_kv + head) * p.head_dim + element % p.head_dim;
            k[e] += plan.slot_k[at];
            v[e] += plan.slot_v[at];
          }
        }
      }
      __syncthreads();  // before matches are written again
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int64_t element = base + e * kBackwardThreads + thread, offset = element / p.head_dim;
      if (element >= elements) continue;
      const int64_t at =
          ((int64_t(page) * p.page_size + offset) * p.heads_kv + head) * p.head_dim + element % p.head_dim;
      static_cast<T*>(plan.b.grad_k)[at] = from_float<T>(k[e]);
      static_cast<T*>(plan.b.grad_v)[at] = from_float<T>(v[e]);
    }
  }
}

}  // namespace tranche
