// Weight-only: float activations times decoded weights, by FMAs. A row of x takes the same operations in the
// same order whatever the others are: blocks of 256 inputs, each one chain, added up in order.
#pragma once

#include "bits/bits_linear_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

// Byte j of every lane, less 128, as float: the byte becomes the low mantissa of 2^23.
TRANCHE_INLINE Vec weights_of(Bytes unit, int j) {
  const Bytes shifted = j == 0 ? unit : bright(unit, 8 * j);
  return vsub(bfloat(bselect(bset(0xffu), shifted, bset(0x4b000000u))), vset(8388608.0f + 128.0f));
}

// One block: `tiles` tiles of `pair` rows of tiles, each in the plain layout, times `rows` rows of x. Adds to
// total[row of tiles][row of x][16].
template <int pair, int rows>
static void float_run(const uint8_t* const (&weights)[2], int64_t tiles, const float* x, int64_t stride,
                      float (*total)[kMostRows][16]) {
  Vec sum[pair][rows][kParts];
  for (auto& tile : sum) {
    for (auto& row : tile) {
      for (Vec& part : row) part = vset(0.0f);
    }
  }
  for (int64_t unit = 0; unit < tiles * kUnits; ++unit) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
      for (int o = 0; o < pair; ++o) {
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
          const Vec w = weights_of(bload(weights[o] + 64 * unit + int(sizeof(Bytes)) * i), j);
#pragma GCC unroll 8
          for (int m = 0; m < rows; ++m) {
            sum[o][m][i] = vfma(w, vset(x[m * stride + 4 * unit + j]), sum[o][m][i]);
          }
        }
      }
    }
  }
  for (int o = 0; o < pair; ++o) {
    for (int m = 0; m < rows; ++m) {
      for (int i = 0; i < kParts; ++i) {
        float* to = &total[o][m][i * kWidth];
        vstore(to, vadd(vload(to), sum[o][m][i]));
      }
    }
  }
}

// `pair` rows of tiles times `rows` rows of x from `first` on. `ready` holds the weights where several passes
// use them, for a pair of one.
template <int pair, int rows>
static void float_row_tiles(const BitsLinearParams& p, const float* x, int64_t stride, const uint8_t* ready,
                            int64_t row_tile, int64_t first) {
  alignas(64) uint8_t run[pair][kRunTiles * kTileBytes8];
  const int64_t tiles = p.groups == 1 ? p.w.input_tiles : p.w.in_features / p.groups / kTileInputs;
  float y[pair][rows][16] = {}, scale[16], bias[16];
  for (int64_t g = 0; g < p.groups; ++g) {
    float total[pair][kMostRows][16] = {};
    const int64_t group_end = (g + 1) * tiles;
    for (int64_t t = g * tiles; t < group_end; t += kRunTiles) {
      const int64_t end = t + kRunTiles < group_end ? t + kRunTiles : group_end;
      const uint8_t* weights[2] = {nullptr, nullptr};
      for (int o = 0; o < pair; ++o) {
        weights[o] = ready ? ready + t * kTileBytes8 : decode_tiles(p.w, row_tile + o, t, end, run[o]);
      }
      float_run<pair, rows>(weights, end - t, x + first * stride + t * kTileInputs, stride, total);
    }
    for (int o = 0; o < pair; ++o) {
      load_scales(p, row_tile + o, g, scale);
      for (int m = 0; m < rows; ++m) {
        for (int r = 0; r < kTileRows; ++r) y[o][m][r] = y[o][m][r] + total[o][m][r] * scale[r];
      }
    }
  }
  const int64_t used = p.rows - first < rows ? p.rows - first : rows;
  for (int o = 0; o < pair; ++o) {
    load_bias(p, row_tile + o, bias);
    for (int64_t m = 0; m < used; ++m) {
      for (int r = 0; r < kTileRows && p.bias; ++r) y[o][m][r] = y[o][m][r] + bias[r];
      store_row(p, first + m, row_tile + o, y[o][m]);
    }
  }
}

static void float_rows(const BitsLinearParams& p, const float* x, int64_t stride, const uint8_t* ready,
                       int64_t row_tile, int64_t first, int rows) {
  switch (rows) {
    case 1:
      return float_row_tiles<1, 1>(p, x, stride, ready, row_tile, first);
    case 2:
      return float_row_tiles<1, 2>(p, x, stride, ready, row_tile, first);
    case 4:
      return float_row_tiles<1, 4>(p, x, stride, ready, row_tile, first);
    default:
      return float_row_tiles<1, kMostRows>(p, x, stride, ready, row_tile, first);
  }
}

static void linear_of_floats(const BitsLinearParams& p, const float* x, int64_t stride) {
  const int pass = pass_rows(p.rows);
  const bool one_pass = p.rows <= pass;
  const int64_t scratch_bytes = one_pass ? 0 : p.w.input_tiles * kTileBytes8;
  share_row_tiles(p, 1, scratch_bytes, [&](int64_t begin, int64_t end, uint8_t* scratch) {
    int64_t row_tile = begin;
    // One row of x is one chain for a row of tiles: two of those side by side hide the latency.
    for (; pass == 1 && row_tile + 2 <= end; row_tile += 2) {
      float_row_tiles<2, 1>(p, x, stride, nullptr, row_tile, 0);
    }
    for (; row_tile < end; ++row_tile) {
      const uint8_t* ready = one_pass ? nullptr : decode_tiles(p.w, row_tile, 0, p.w.input_tiles, scratch);
      for (int64_t first = 0; first < p.rows; first += pass) {
        float_rows(p, x, stride, ready, row_tile, first, pass);
      }
    }
  });
}

template <class T>
static void rows_to_float(const BitsLinearParams& p, const Workspace& space, float* to) {
  parallel_for(space.padded_rows, [&p, &space, to](int64_t row) {
    float* line = to + row * space.padded_inputs;
    int64_t i = 0;
    if (row < p.rows) {
      row_to_float(static_cast<const T*>(p.x) + row * p.x_stride, line, int(p.w.in_features));
      i = p.w.in_features;
    }
    for (; i < space.padded_inputs; ++i) line[i] = 0.0f;
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA
