// Two kernels of eight warps for 16 outputs: integer activations by MMA, float activations by FMA. Decoded
// weights go from registers straight to either.
#pragma once

#include "bits/bits_linear.h"
#include "bits/decode.cuh"
#include "core/ptx.cuh"

namespace tranche {

constexpr int kLinearWarps = 8;

// The workspace of both: x ready for the kernel.
struct BitsLinearLaunch {
  BitsLinearParams p;
  const int8_t* codes;     // [rows, padded_inputs], padded with zeros
  const float* floats;     // likewise, weight-only
  const float* x_scale;    // [rows]
  const int32_t* row_sum;  // [rows, groups]
  int64_t padded_inputs;   // a multiple of 32
};

__device__ __forceinline__ void store_output(const BitsLinearParams& p, int64_t row, int64_t output,
                                             float y) {
  const int64_t at = row * p.w.out_features + output;
  if (p.type == DType::f32) {
    static_cast<float*>(p.out)[at] = y;
  } else if (p.type == DType::f16) {
    static_cast<half*>(p.out)[at] = from_float<half>(y);
  } else {
    static_cast<bf16*>(p.out)[at] = from_float<bf16>(y);
  }
}

__device__ __forceinline__ void finish_output(const BitsLinearLaunch& k, int64_t row, int64_t output,
                                              float total) {
  float y = __fmul_rn(total, k.x_scale[row]);
  if (k.p.bias) y = __fadd_rn(y, k.p.bias[output]);
  store_output(k.p, row, output, y);
}

// ---- integer activations

// Adds tiles [begin, end) of a row of tiles to sums: chunks first, first + step, ... of 4 tiles.
template <int planes, int columns>
__device__ __forceinline__ void add_chunks(const BitsLinearLaunch& k, int64_t row_tile, int64_t begin,
                                           int64_t end, int64_t first, int64_t step, int64_t first_row,
                                           int32_t (&sums)[columns][4]) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const Rounding rounding = rounding_of_bits(k.p.w.bits);
  for (int64_t chunk = begin + kChunkTiles * first; chunk < end; chunk += kChunkTiles * step) {
    const int64_t tile = chunk + t;
    const bool valid = tile < end;
    const LaneTile weights = load_lane_tile<planes>(k.p.w, row_tile * k.p.w.input_tiles + tile, g, valid);
    uint32_t a[4][4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[s][i] = lane_word<planes>(weights, i % 2, i / 2, s, rounding);
    }
#pragma unroll
    for (int n = 0; n < columns; ++n) {
      const int64_t row = first_row + 8 * n + g;
      uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
      if (valid && row < k.p.rows) {
        const uint4* x = reinterpret_cast<const uint4*>(k.codes + row * k.padded_inputs + tile * kTileInputs);
        low = x[0];
        high = x[1];
      }
      const uint32_t b[4][2] = {{low.x, high.x}, {low.y, high.y}, {low.z, high.z}, {low.w, high.w}};
#pragma unroll
      for (int s = 0; s < 4; ++s) ptx::mma_m16n8k32<uint8_t>(sums[n], a[s], b[s]);
    }
  }
}

// Which output and row of x the element i of an accumulator is: outputs 2g and 2g + 1, rows 2t and 2t + 1.
__device__ __forceinline__ int sum_output(int lane, int i) { return lane / 4 * 2 + i / 2; }
__device__ __forceinline__ int sum_row(int lane, int i) { return lane % 4 * 2 + i % 2; }

// One scale a channel, or none: warps share the inputs of one row of tiles.
template <int planes, int columns>
__global__ void __launch_bounds__(32 * kLinearWarps) bits_linear_integer_kernel(BitsLinearLaunch k) {
  constexpr int kRows = 8 * columns;
  SHARED(int32_t, shared, kLinearWarps * kTileRows * kRows);  // [warp][output][row of x]
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t row_tile = blockIdx.x, first_row = int64_t(blockIdx.y) * kRows;
  int32_t sums[columns][4] = {};
  add_chunks<planes, columns>(k, row_tile, 0, k.p.w.input_tiles, warp, kLinearWarps, first_row, sums);
#pragma unroll
  for (int n = 0; n < columns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shared[(warp * kTileRows + sum_output(lane, i)) * kRows + 8 * n + sum_row(lane, i)] = sums[n][i];
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < kTileRows * kRows; i += 32 * kLinearWarps) {
    const int64_t output = row_tile * kTileRows + i % kTileRows, row = first_row + i / kTileRows;
    if (output >= k.p.w.out_features || row >= k.p.rows) continue;
    uint32_t sum = 0;
    for (int w = 0; w < kLinearWarps; ++w) {
      sum += uint32_t(shared[(w * kTileRows + i % kTileRows) * kRows + i / kTileRows]);
    }
    const int32_t exact = int32_t(sum - 128u * uint32_t(k.row_sum[row]));
    if (k.p.kind == LinearKind::integers) {
      static_cast<int32_t*>(k.p.out)[row * k.p.w.out_features + output] = exact >> (8 - k.p.w.bits);
    } else {
      finish_output(k, row, output, __fadd_rn(0.0f, __fmul_rn(float(exact), k.p.scale[output])));
    }
  }
}

// A scale a group: groups are added in order, so a warp has a row of tiles to itself.
template <int planes, int columns>
__global__ void __launch_bounds__(32 * kLinearWarps) bits_linear_group_kernel(BitsLinearLaunch k) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t row_tile = int64_t(blockIdx.x) * kLinearWarps + warp;
  const int64_t first_row = int64_t(blockIdx.y) * 8 * columns;
  if (row_tile >= k.p.w.row_tiles) return;
  const int64_t tiles = k.p.w.input_tiles / k.p.groups;
  float total[columns][4] = {};
  for (int64_t group = 0; group < k.p.groups; ++group) {
    int32_t sums[columns][4] = {};
    add_chunks<planes, columns>(k, row_tile, group * tiles, (group + 1) * tiles, 0, 1, first_row, sums);
#pragma unroll
    for (int n = 0; n < columns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t output = row_tile * kTileRows + sum_output(lane, i);
        const int64_t row = first_row + 8 * n + sum_row(lane, i);
        if (output >= k.p.w.out_features || row >= k.p.rows) continue;
        const uint32_t row_sum = uint32_t(k.row_sum[row * k.p.groups + group]);
        const int32_t exact = int32_t(uint32_t(sums[n][i]) - 128u * row_sum);
        const float scaled = __fmul_rn(float(exact), k.p.scale[output * k.p.groups + group]);
        total[n][i] = __fadd_rn(total[n][i], scaled);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < columns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t output = row_tile * kTileRows + sum_output(lane, i);
      const int64_t row = first_row + 8 * n + sum_row(lane, i);
      if (output < k.p.w.out_features && row < k.p.rows) finish_output(k, row, output, total[n][i]);
    }
  }
}

// ---- float activations

// x as floats, padded with zeros: one row a block.
__global__ void __launch_bounds__(256) bits_linear_widen_kernel(BitsLinearLaunch k) {
  const int64_t row = blockIdx.x;
  float* to = const_cast<float*>(k.floats) + row * k.padded_inputs;
  for (int64_t i = threadIdx.x; i < k.padded_inputs; i += 256) {
    float x = 0.0f;
    if (i < k.p.w.in_features) {
      const int64_t at = row * k.p.x_stride + i;
      x = k.p.type == DType::f32   ? static_cast<const float*>(k.p.x)[at]
          : k.p.type == DType::f16 ? to_float(static_cast<const half*>(k.p.x)[at])
                                   : to_float(static_cast<const bf16*>(k.p.x)[at]);
    }
    to[i] = x;
  }
}

// A lane adds up one tile of two outputs in a chain and scales it; lanes, then warps, are added in a fixed
// order that depends on the inputs' number only.
template <int planes, int rows>
__global__ void __launch_bounds__(32 * kLinearWarps) bits_linear_float_kernel(BitsLinearLaunch k) {
  SHARED(float, shared, kLinearWarps * kTileRows * rows);  // [warp][output][row of x]
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int64_t row_tile = blockIdx.x, first_row = int64_t(blockIdx.y) * rows;
  const int64_t tiles = k.p.w.input_tiles;
  const int64_t group_tiles = k.p.groups == 1 ? tiles : k.p.w.in_features / k.p.groups / kTileInputs;
  const Rounding rounding = rounding_of_bits(k.p.w.bits);
  const int64_t output = row_tile * kTileRows + 2 * g;

  float total[2][rows] = {};
  for (int64_t tile = kChunkTiles * warp + t; tile < tiles; tile += kChunkTiles * kLinearWarps) {
    const LaneTile weights = load_lane_tile<planes>(k.p.w, row_tile * tiles + tile, g, true);
    float sum[2][rows] = {};
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      float4 x[rows];
#pragma unroll
      for (int m = 0; m < rows; ++m) {
        const int64_t row = first_row + m < k.p.rows ? first_row + m : k.p.rows - 1;
        x[m] =
            *reinterpret_cast<const float4*>(k.floats + row * k.padded_inputs + tile * kTileInputs + 4 * v);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t word = lane_word<planes>(weights, r, v / 4, v % 4, rounding);
        float w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = float(int32_t(word >> (8 * j) & 0xffu) - 128);
#pragma unroll
        for (int m = 0; m < rows; ++m) {
          sum[r][m] = __fmaf_rn(w[0], x[m].x, sum[r][m]);
          sum[r][m] = __fmaf_rn(w[1], x[m].y, sum[r][m]);
          sum[r][m] = __fmaf_rn(w[2], x[m].z, sum[r][m]);
          sum[r][m] = __fmaf_rn(w[3], x[m].w, sum[r][m]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool in_use = output + r < k.p.w.out_features;
      const float scale = in_use ? k.p.scale[(output + r) * k.p.groups + tile / group_tiles] : 0.0f;
#pragma unroll
      for (int m = 0; m < rows; ++m) total[r][m] = __fmaf_rn(sum[r][m], scale, total[r][m]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int m = 0; m < rows; ++m) {
      float y = total[r][m];
      y = __fadd_rn(y, __shfl_xor_sync(0xffffffffu, y, 1));
      y = __fadd_rn(y, __shfl_xor_sync(0xffffffffu, y, 2));
      if (t == 0) shared[(warp * kTileRows + 2 * g + r) * rows + m] = y;
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < kTileRows * rows; i += 32 * kLinearWarps) {
    const int64_t to = row_tile * kTileRows + i % kTileRows, row = first_row + i / kTileRows;
    if (to >= k.p.w.out_features || row >= k.p.rows) continue;
    float y = 0.0f;
    for (int w = 0; w < kLinearWarps; ++w) {
      y = __fadd_rn(y, shared[(w * kTileRows + i % kTileRows) * rows + i / kTileRows]);
    }
    if (k.p.bias) y = __fadd_rn(y, k.p.bias[to]);
    store_output(k.p, row, to, y);
  }
}

}  // namespace tranche
