// The experts in two kernels: gate and up, whose results h = act(gate x) * (up x) go to the workspace, then
// down and the weighted sum. Weight rows are the M side of the product and columns (tokens) the N side, so
// every weight is read once for up to 64 columns.
//
// A block owns kRows weight rows; its warps take chunks of 32 k in turn, and their partial sums are added in
// the order of the warps. In gate-and-up, row g of a tile of 16 is a feature's gate and row g + 8 its up, so
// that one lane holds both. Within a chunk lane (g, c) holds elements 8 c .. 8 c + 7 of its rows and of its
// column, which are the operands of two MMAs when both sides number k alike: no shared memory lies between
// memory and tensor core.
#pragma once

#include <math.h>

#include "moe/moe_experts.h"
#include "moe/moe_load.cuh"

namespace tranche {

struct MoeExpertsTraits {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kTiles = 2, kRows = 16 * kTiles;  // of 16 rows
  static constexpr int kChunk = 32;
  static constexpr int kTokens = 64;  // whose sums a block of the down kernel keeps
  static_assert(kChunk == 4 * 8, "four lanes of eight elements");

  static constexpr int kStride = kRows + 1;  // of a column of partial sums: off by a bank
  template <int kColumns>
  static constexpr size_t kPartialFloats = size_t(kWarps) * kColumns * kStride;
};

// Columns of one lane in a tile of eight: tensor cores take one, the FMA form two.
template <class T>
constexpr int kLaneColumns = std::is_same_v<T, float> ? 2 : 1;

template <class T>
__device__ __forceinline__ int lane_column(int tile, int i) {
  const int lane = int(threadIdx.x) % 32;
  if constexpr (std::is_same_v<T, float>) return tile * 8 + lane % 4 * 2 + i;
  return tile * 8 + lane / 4;
}

// The weight rows of a lane: rows g and g + 8 of each tile; null where the matrix has none.
template <class W>
struct LaneRows {
  const W* row[MoeExpertsTraits::kTiles][2];
};

template <class T, int kColumnTiles>
struct LaneColumns {
  const T* column[kColumnTiles][kLaneColumns<T>];
};

template <int kColumnTiles>
struct Sums {
  float d[MoeExpertsTraits::kTiles][kColumnTiles][4];
};

template <class T, class W>
struct LaneWeights {
  Eight<T> rows[MoeExpertsTraits::kTiles][2];

  __device__ __forceinline__ void load(const LaneRows<W>& from, int k, int depth) {
#pragma unroll
    for (int m = 0; m < MoeExpertsTraits::kTiles; ++m) {
      rows[m][0] = load_eight<T>(from.row[m][0], k, depth);
      rows[m][1] = load_eight<T>(from.row[m][1], k, depth);
    }
  }
};

template <class T, class W, int kColumnTiles>
__device__ __forceinline__ void multiply_chunk(const LaneWeights<T, W>& w,
                                               const LaneColumns<T, kColumnTiles>& columns, int count, int k,
                                               int depth, Sums<kColumnTiles>& sums) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    if (n * 8 >= count) continue;
    if constexpr (std::is_same_v<T, float>) {
      const Eight<T> x0 = load_eight<T>(columns.column[n][0], k, depth);
      const Eight<T> x1 = load_eight<T>(columns.column[n][1], k, depth);
#pragma unroll
      for (int m = 0; m < MoeExpertsTraits::kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float (&d)[4] = sums.d[m][n];
          d[0] = fmaf(w.rows[m][0].value[i], x0.value[i], d[0]);
          d[1] = fmaf(w.rows[m][0].value[i], x1.value[i], d[1]);
          d[2] = fmaf(w.rows[m][1].value[i], x0.value[i], d[2]);
          d[3] = fmaf(w.rows[m][1].value[i], x1.value[i], d[3]);
        }
      }
    } else {
      const Eight<T> x = load_eight<T>(columns.column[n][0], k, depth);
#pragma unroll
      for (int m = 0; m < MoeExpertsTraits::kTiles; ++m) {
        const Eight<T>&low = w.rows[m][0], &high = w.rows[m][1];
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t a[4] = {low.pair[i], high.pair[i], low.pair[i + 1], high.pair[i + 1]};
          const uint32_t b[2] = {x.pair[i], x.pair[i + 1]};
          ptx::mma_m16n8k16<T>(sums.d[m][n], a, b);
        }
      }
    }
  }
}

// This warp's part of the product, then its place in `partial` [warp][column][row].
template <class T, class W, int kColumnTiles>
__device__ __forceinline__ void multiply(const LaneRows<W>& rows, const LaneColumns<T, kColumnTiles>& columns,
                                         int count, int depth, float* partial) {
  constexpr int kTiles = MoeExpertsTraits::kTiles, kStride = MoeExpertsTraits::kStride;
  constexpr int kStep = MoeExpertsTraits::kChunk * MoeExpertsTraits::kWarps;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  Sums<kColumnTiles> sums;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.d[m][n][i] = 0.0f;
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    // every lane needs its rows at every k of the chunk
    for (int first = warp * MoeExpertsTraits::kChunk; first < depth; first += kStep) {
      for (int k = first; k < first + MoeExpertsTraits::kChunk && k < depth; k += 8) {
        LaneWeights<T, W> w;
        w.load(rows, k, depth);
        multiply_chunk(w, columns, count, k, depth, sums);
      }
    }
  } else {
    int k = warp * MoeExpertsTraits::kChunk + lane % 4 * 8;
    LaneWeights<T, W> w;
    w.load(rows, k, depth);
    for (int first = warp * MoeExpertsTraits::kChunk; first < depth; first += kStep, k += kStep) {
      LaneWeights<T, W> ahead;  // asked for before the present ones are used
      ahead.load(rows, k + kStep, depth);
      multiply_chunk(w, columns, count, k, depth, sums);
      w = ahead;
    }
  }
  constexpr int kColumns = 8 * kColumnTiles;
  float* to = partial + warp * kColumns * kStride;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      const int row = m * 16 + lane / 4, column = n * 8 + lane % 4 * 2;
      to[column * kStride + row] = sums.d[m][n][0];
      to[(column + 1) * kStride + row] = sums.d[m][n][1];
      to[column * kStride + row + 8] = sums.d[m][n][2];
      to[(column + 1) * kStride + row + 8] = sums.d[m][n][3];
    }
  }
}

// The sum over warps of one element of the product.
template <int kColumns>
__device__ __forceinline__ float total(const float* partial, int row, int column) {
  float sum = partial[column * MoeExpertsTraits::kStride + row];
#pragma unroll
  for (int w = 1; w < MoeExpertsTraits::kWarps; ++w) {
    sum += partial[(w * kColumns + column) * MoeExpertsTraits::kStride + row];
  }
  return sum;
}

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::silu:
      return x / (1.0f + expf(-x));
    case Activation::gelu:
      return 0.5f * x * erfcf(-x * 0.70710678118654752f);
    case Activation::relu:
      break;
  }
  return x < 0.0f ? 0.0f : x;
}

template <class W>
__device__ __forceinline__ const W* matrix_row(const ExpertMatrices& m, int expert, int row, int rows) {
  if (row >= rows) return nullptr;
  return static_cast<const W*>(m.data) + expert * m.stride[0] + row * m.stride[1];
}

__device__ __forceinline__ float row_scale(const ExpertMatrices& m, int expert, int row, int rows) {
  return m.scale ? m.scale[int64_t(expert) * rows + row] : 1.0f;
}

__device__ __forceinline__ int bounded(int x, int low, int high) {
  return x < low ? low : (x > high ? high : x);
}

// Columns of h are rows of `inner` elements, 16-byte aligned.
__device__ __host__ __forceinline__ int64_t h_stride(const MoeExpertsParams& p) {
  return (int64_t(p.inner) + 7) / 8 * 8;
}

template <class T>
__device__ __forceinline__ T* h_row(const MoeExpertsParams& p, int slot) {
  return static_cast<T*>(p.workspace) + slot * h_stride(p);
}

// Slots of an expert, whatever the plan holds.
struct SlotRange {
  int begin, end;
};

__device__ __forceinline__ SlotRange slots_of(const MoeExpertsParams& p, int expert) {
  const int all = p.tokens * p.top_k;
  const int begin = bounded(p.offsets[expert], 0, all);
  return {begin, bounded(p.offsets[expert + 1], begin, all)};
}

__device__ __forceinline__ int slot_at(const MoeExpertsParams& p, int index) {
  return bounded(p.slots[index], 0, p.tokens * p.top_k - 1);
}

// Grid: blocks of features, experts. A block owns kRows / 2 features with their gates, or kRows without
// gates.
template <class T, class W, int kColumnTiles>
__global__ void __launch_bounds__(MoeExpertsTraits::kThreads) moe_gate_up_kernel(MoeExpertsParams p) {
  constexpr int kColumns = 8 * kColumnTiles, kTiles = MoeExpertsTraits::kTiles;
  float* partial = dynamic_smem<float>();
  const int expert = int(blockIdx.y), g = int(threadIdx.x) % 32 / 4;
  const SlotRange range = slots_of(p, expert);
  if (range.begin == range.end) return;
  const bool gated = p.gate.data != nullptr;
  const int tile_features = gated ? 8 : 16, features = kTiles * tile_features;
  const int first_feature = int(blockIdx.x) * features;

  LaneRows<W> rows;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int feature = first_feature + m * tile_features + g;
    rows.row[m][0] = matrix_row<W>(gated ? p.gate : p.up, expert, feature, p.inner);
    rows.row[m][1] = matrix_row<W>(p.up, expert, gated ? feature : feature + 8, p.inner);
  }
  for (int first = range.begin; first < range.end; first += kColumns) {
    const int count = range.end - first < kColumns ? range.end - first : kColumns;
    LaneColumns<T, kColumnTiles> columns;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < kLaneColumns<T>; ++i) {
        const int c = lane_column<T>(n, i);
        const int64_t token = c < count ? slot_at(p, first + c) / p.top_k : 0;
        columns.column[n][i] = c < count ? static_cast<const T*>(p.x) + token * p.x_stride : nullptr;
      }
    }
    multiply<T>(rows, columns, count, p.hidden, partial);
    __syncthreads();
    for (int i = int(threadIdx.x); i < features * count; i += MoeExpertsTraits::kThreads) {
      const int feature = i % features, c = i / features;
      const int row = feature / tile_features * 16 + feature % tile_features;
      const int at = first_feature + feature;
      if (at >= p.inner) continue;
      float h;
      if (gated) {
        const float gate = total<kColumns>(partial, row, c) * row_scale(p.gate, expert, at, p.inner);
        const float up = total<kColumns>(partial, row + 8, c) * row_scale(p.up, expert, at, p.inner);
        h = activate(p.activation, gate) * up;
      } else {
        h = activate(p.activation, total<kColumns>(partial, row, c) * row_scale(p.up, expert, at, p.inner));
      }
      h_row<T>(p, slot_at(p, first + c))[at] = from_float<T>(h);
    }
    __syncthreads();
  }
}

// The first index in [begin, end) whose slot is `slot` or beyond; slots ascend.
__device__ __forceinline__ int first_slot(const MoeExpertsParams& p, int begin, int end, int64_t slot) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (p.slots[middle] < slot) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Grid: blocks of kRows output features, blocks of kTokens tokens. Experts in turn, in ascending order.
template <class T, class W, int kColumnTiles>
__global__ void __launch_bounds__(MoeExpertsTraits::kThreads) moe_down_kernel(MoeExpertsParams p) {
  constexpr int kColumns = 8 * kColumnTiles, kRows = MoeExpertsTraits::kRows,
                kTokens = MoeExpertsTraits::kTokens;
  constexpr int kWarps = MoeExpertsTraits::kWarps, kThreads = MoeExpertsTraits::kThreads;
  float* partial = dynamic_smem<float>();
  float* sums = partial + MoeExpertsTraits::kPartialFloats<kColumns>;  // [output][token][row]
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int first_row = int(blockIdx.x) * kRows, first_token = int(blockIdx.y) * kTokens;
  const int tokens = p.tokens - first_token < kTokens ? p.tokens - first_token : kTokens;
  const float* coefficients = static_cast<const float*>(p.coefficients);
  for (int i = int(threadIdx.x); i < p.outputs * kTokens * kRows; i += kThreads) sums[i] = 0.0f;

  for (int expert = 0; expert < p.experts; ++expert) {
    const SlotRange all = slots_of(p, expert);
    if (all.begin == all.end) continue;
    const int begin = first_slot(p, all.begin, all.end, int64_t(first_token) * p.top_k);
    const int end = first_slot(p, begin, all.end, int64_t(first_token + tokens) * p.top_k);
    if (begin == end) continue;
    LaneRows<W> rows;
#pragma unroll
    for (int m = 0; m < MoeExpertsTraits::kTiles; ++m) {
      const int row = first_row + m * 16 + lane / 4;
      rows.row[m][0] = matrix_row<W>(p.down, expert, row, p.hidden);
      rows.row[m][1] = matrix_row<W>(p.down, expert, row + 8, p.hidden);
    }
    for (int first = begin; first < end; first += kColumns) {
      const int count = end - first < kColumns ? end - first : kColumns;
      LaneColumns<T, kColumnTiles> columns;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < kLaneColumns<T>; ++i) {
          const int c = lane_column<T>(n, i);
          columns.column[n][i] = c < count ? h_row<T>(p, slot_at(p, first + c)) : nullptr;
        }
      }
      multiply<T>(rows, columns, count, p.inner, partial);
      __syncthreads();
      // a warp owns the tokens that are its number modulo the warps, so that two choices of one token never
      // meet
      const int at = first_row + lane;
      const float scale = at < p.hidden ? row_scale(p.down, expert, at, p.hidden) : 0.0f;
      for (int c = 0; c < count; ++c) {
        const int slot = slot_at(p, first + c), token = slot / p.top_k - first_token;
        if (token < 0 || token >= tokens || token % kWarps != warp) continue;
        const float yields = total<kColumns>(partial, lane, c) * scale;
        for (int o = 0; o < p.outputs; ++o) {
          const float coefficient = coefficients[int64_t(o) * p.tokens * p.top_k + slot];
          float& sum = sums[(o * kTokens + token) * kRows + lane];
          if (coefficient != 0.0f) sum = fmaf(coefficient, yields, sum);
        }
      }
      __syncthreads();
    }
  }
  __syncthreads();
  const int at = first_row + lane;
  if (at >= p.hidden) return;
  for (int i = warp; i < p.outputs * tokens; i += kWarps) {
    const int o = i / tokens, token = i % tokens;
    const int64_t t = first_token + token;
    float y = sums[(o * kTokens + token) * kRows + lane];
    if (p.residual) y += to_float(static_cast<const T*>(p.residual)[t * p.residual_stride + at]);
    static_cast<T*>(p.out[o])[t * p.hidden + at] = from_float<T>(y);
  }
}

static_assert(MoeExpertsTraits::kRows == 32, "a lane is a row where sums are kept");

}  // namespace tranche
