// The experts in two kernels: gate and up, whose results h = act(gate x) * (up x) go to the workspace, then
// down and the weighted sum. Weight rows are the M side of the product and columns (tokens) the N side, so
// every weight is read once for up to 64 columns.
//
// A block owns kRows weight rows; its warps take chunks of 32 k in turn, and their partial sums are added in
// the order of the warps. In gate-and-up, row g of a tile of 16 is a feature's gate and row g + 8 its up, so
// that one lane holds both. Within a chunk lane (g, c) holds elements 8 c .. 8 c + 7 of its rows and of its
// column, which are the operands of two MMAs when both sides number k alike: no shared memory lies between
// memory and tensor core.
//
// The plan is given, or nothing needs one because every expert serves every token, or gate-and-up makes it:
// each block lists the slots of its expert, and one block of each expert leaves them to the down kernel.
#pragma once

#include <math.h>

#include "moe/moe_experts.h"
#include "moe/moe_load.cuh"

namespace tranche {

struct MoeExpertsTraits {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kTiles = 2, kRows = 16 * kTiles;  // of 16 rows
  static constexpr int kChunk = 32;
  static constexpr int kTokens = 64;    // whose sums a block of the down kernel keeps
  static constexpr int kListed = 1024;  // slots of which gate-and-up makes a plan; of more moe_plan does
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

  // row[tile][half] is `at` of the expert's `rows`.
  __device__ __forceinline__ void set(int tile, int half, const ExpertMatrices& m, int expert, int at,
                                      int rows, int, int) {
    row[tile][half] =
        at < rows ? static_cast<const W*>(m.data) + expert * m.stride[0] + at * m.stride[1] : nullptr;
  }
  __device__ __forceinline__ const W* at(int tile, int half) const { return row[tile][half]; }
};

template <>
struct LaneRows<Packed> {
  PackedWeight w[2];  // whose rows are the first and the second of each tile
  int row[MoeExpertsTraits::kTiles][2];

  __device__ __forceinline__ void set(int tile, int half, const ExpertMatrices& m, int expert, int at,
                                      int rows, int columns, int bits) {
    w[half] = packed_expert(m, expert, rows, columns, bits);
    row[tile][half] = at < rows ? at : -1;
  }
  __device__ __forceinline__ PackedRow at(int tile, int half) const { return {&w[half], row[tile][half]}; }
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
      rows[m][0] = load_eight<T>(from.at(m, 0), k, depth);
      rows[m][1] = load_eight<T>(from.at(m, 1), k, depth);
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
    if constexpr (std::is_same_v<W, Packed>) {
      // decoding needs the registers: others of the warps that then fit ask for what comes next
      for (int first = warp * MoeExpertsTraits::kChunk; first < depth; first += kStep, k += kStep) {
        w.load(rows, k, depth);
        multiply_chunk(w, columns, count, k, depth, sums);
      }
    } else {
      w.load(rows, k, depth);
      for (int first = warp * MoeExpertsTraits::kChunk; first < depth; first += kStep, k += kStep) {
        LaneWeights<T, W> ahead;  // asked for before the present ones are used
        ahead.load(rows, k + kStep, depth);
        multiply_chunk(w, columns, count, k, depth, sums);
        w = ahead;
      }
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

// An expert has at most as many columns as there are tokens; fewer tiles leave registers for more blocks. The
// order of every sum is the same in both.
inline bool few_columns(const MoeExpertsParams& p) { return p.tokens <= 16; }

template <class T>
__device__ __forceinline__ T* h_row(const MoeExpertsParams& p, int slot) {
  return static_cast<T*>(p.workspace) + slot * h_stride(p);
}

// Where a plan made on the way lies: behind h.
__device__ __host__ __forceinline__ int64_t h_bytes(const MoeExpertsParams& p) {
  const int64_t bytes = int64_t(p.tokens) * p.top_k * h_stride(p) * (p.type == DType::f32 ? 4 : 2);
  return (bytes + 15) / 16 * 16;
}

__device__ __host__ __forceinline__ int32_t* made_offsets(const MoeExpertsParams& p) {
  return reinterpret_cast<int32_t*>(static_cast<char*>(p.workspace) + h_bytes(p));
}

__device__ __host__ __forceinline__ int32_t* made_slots(const MoeExpertsParams& p) {
  return made_offsets(p) + p.experts + 1;
}

// Slots of the experts, whatever the plan holds.
struct SlotRange {
  int begin, end;
};

class PlanView {
 public:
  __device__ __forceinline__ explicit PlanView(const MoeExpertsParams& p)
      : offsets_(p.ids ? made_offsets(p) : p.offsets),
        slots_(p.ids ? made_slots(p) : p.slots),
        tokens_(p.tokens),
        top_k_(p.top_k) {}

  __device__ __forceinline__ SlotRange of(int expert) const {
    if (offsets_ == nullptr) return {expert * tokens_, (expert + 1) * tokens_};
    const int all = tokens_ * top_k_;
    const int begin = bounded(offsets_[expert], 0, all);
    return {begin, bounded(offsets_[expert + 1], begin, all)};
  }

  __device__ __forceinline__ int slot(int index) const {
    if (offsets_ == nullptr) return index % tokens_ * top_k_ + index / tokens_;
    return bounded(slots_[index], 0, tokens_ * top_k_ - 1);
  }

  // The first index in [begin, end) whose slot is that of `token` or of a later one; slots ascend.
  __device__ __forceinline__ int first_of(int begin, int end, int token) const {
    const int64_t slot = int64_t(token) * top_k_;
    while (begin < end) {
      const int middle = begin + (end - begin) / 2;
      if (this->slot(middle) < slot) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }

 private:
  const int32_t *offsets_, *slots_;
  int tokens_, top_k_;
};

// Lists the slots of one expert in `listed`, in order, and returns their number. With `publish` they also go
// to the plan in the workspace. `found` is scratch for a count from each warp.
__device__ inline int list_slots(const MoeExpertsParams& p, int expert, bool publish, int32_t* listed,
                                 int* found) {
  constexpr int kThreads = MoeExpertsTraits::kThreads, kWarps = MoeExpertsTraits::kWarps;
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, all = p.tokens * p.top_k;
  int begin = 0, count = 0;
  for (int first = 0; first < all; first += kThreads) {
    const int id = first + thread < all ? p.ids[first + thread] : -1;
    const unsigned lanes = __ballot_sync(0xffffffffu, id == expert);
    if (lane == 0) found[warp] = __popc(lanes);
    begin += __syncthreads_count(id >= 0 && id < expert);
    int at = count + __popc(lanes & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += found[w];
      count += found[w];
    }
    if (id == expert) listed[at] = first + thread;
    __syncthreads();
  }
  if (!publish) return count;
  int32_t *offsets = made_offsets(p), *slots = made_slots(p);
  if (thread == 0) offsets[expert] = begin;
  if (thread == 0 && expert == p.experts - 1) offsets[p.experts] = begin + count;
  for (int i = thread; i < count; i += kThreads) slots[begin + i] = listed[i];
  return count;
}

// One block of gate-and-up: kRows / 2 features with their gates, or kRows without gates.
template <class T, class W, int kColumnTiles>
__device__ __forceinline__ void gate_up_block(const MoeExpertsParams& p, int expert, int feature_block,
                                              float* partial) {
  constexpr int kColumns = 8 * kColumnTiles, kTiles = MoeExpertsTraits::kTiles;
  SHARED(int32_t, listed, MoeExpertsTraits::kListed);
  SHARED(int, found, MoeExpertsTraits::kWarps);
  const int g = int(threadIdx.x) % 32 / 4;
  const bool listing = p.ids != nullptr && p.tokens * p.top_k <= MoeExpertsTraits::kListed;
  const PlanView plan(p);
  const SlotRange range =
      listing ? SlotRange{0, list_slots(p, expert, feature_block == 0, listed, found)} : plan.of(expert);
  if (range.begin == range.end) return;
  const auto slot_at = [&](int index) { return listing ? listed[index] : plan.slot(index); };
  const bool gated = p.gate.data != nullptr;
  const int tile_features = gated ? 8 : 16, features = kTiles * tile_features;
  const int first_feature = feature_block * features;

  LaneRows<W> rows;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int feature = first_feature + m * tile_features + g;
    rows.set(m, 0, gated ? p.gate : p.up, expert, feature, p.inner, p.hidden, p.bits);
    rows.set(m, 1, p.up, expert, gated ? feature : feature + 8, p.inner, p.hidden, p.bits);
  }
  for (int first = range.begin; first < range.end; first += kColumns) {
    const int count = range.end - first < kColumns ? range.end - first : kColumns;
    LaneColumns<T, kColumnTiles> columns;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < kLaneColumns<T>; ++i) {
        const int c = lane_column<T>(n, i);
        const int64_t token = c < count ? slot_at(first + c) / p.top_k : 0;
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
      h_row<T>(p, slot_at(first + c))[at] = from_float<T>(h);
    }
    __syncthreads();
  }
}

// Grid: blocks of features, experts.
template <class T, class W, int kColumnTiles>
__global__ void __launch_bounds__(MoeExpertsTraits::kThreads) moe_gate_up_kernel(MoeExpertsParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  gate_up_block<T, W, kColumnTiles>(p, int(blockIdx.y), int(blockIdx.x), dynamic_smem<float>());
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
  ptx::grid_dependency_wait();

  const PlanView plan(p);
  for (int expert = 0; expert < p.experts; ++expert) {
    const SlotRange all = plan.of(expert);
    if (all.begin == all.end) continue;
    const int begin = plan.first_of(all.begin, all.end, first_token);
    const int end = plan.first_of(begin, all.end, first_token + tokens);
    if (begin == end) continue;
    LaneRows<W> rows;
#pragma unroll
    for (int m = 0; m < MoeExpertsTraits::kTiles; ++m) {
      const int row = first_row + m * 16 + lane / 4;
      rows.set(m, 0, p.down, expert, row, p.hidden, p.inner, p.bits);
      rows.set(m, 1, p.down, expert, row + 8, p.hidden, p.inner, p.bits);
    }
    for (int first = begin; first < end; first += kColumns) {
      const int count = end - first < kColumns ? end - first : kColumns;
      LaneColumns<T, kColumnTiles> columns;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < kLaneColumns<T>; ++i) {
          const int c = lane_column<T>(n, i);
          columns.column[n][i] = c < count ? h_row<T>(p, plan.slot(first + c)) : nullptr;
        }
      }
      multiply<T>(rows, columns, count, p.inner, partial);
      __syncthreads();
      // a warp owns the tokens that are its number modulo the warps, so that two choices of one token never
      // meet
      const int at = first_row + lane;
      const float scale = at < p.hidden ? row_scale(p.down, expert, at, p.hidden) : 0.0f;
      for (int c = 0; c < count; ++c) {
        const int slot = plan.slot(first + c), token = slot / p.top_k - first_token;
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
