// Integer activations by dot products of four bytes: few rows of x, or an instruction set without tiles.
#pragma once

#include "bits/bits_linear_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

// Adds the products of `rows` rows of x with some tiles, in the plain layout, to sums.
template <int rows>
static void dot_run(const uint8_t* weights, int64_t tiles, const int8_t* x, int64_t stride,
                    int32_t (*sums)[16]) {
  // A dot product takes five cycles: a single row keeps four chains of them going.
  constexpr int chains = kParts > 1 ? 1 : rows == 1 ? 4 : rows == 2 ? 2 : 1;
  Bytes sum[chains][rows][kParts];
  for (auto& chain : sum) {
    for (auto& row : chain) {
      for (Bytes& part : row) part = bset(0);
    }
  }
  for (int64_t t = 0; t < tiles; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kUnits; ++v) {
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) {
        const Bytes unit = bload(weights + t * kTileBytes8 + 64 * v + int(sizeof(Bytes)) * i);
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) {
          Bytes& to = sum[v % chains][m][i];
          to = bdot(to, unit, x + m * stride + t * kTileInputs + 4 * v);
        }
      }
    }
  }
  for (int m = 0; m < rows; ++m) {
    for (int i = 0; i < kParts; ++i) {
      int32_t* to = &sums[m][i * int(sizeof(Bytes)) / 4];
      Bytes all = bload(to);
      for (int c = 0; c < chains; ++c) all = badd(all, sum[c][m][i]);
      bstore(to, all);
    }
  }
}

static void dot_rows(const uint8_t* weights, int64_t tiles, const int8_t* x, int64_t stride, int rows,
                     int32_t (*sums)[16]) {
  switch (rows) {
    case 1:
      return dot_run<1>(weights, tiles, x, stride, sums);
    case 2:
      return dot_run<2>(weights, tiles, x, stride, sums);
    case 4:
      return dot_run<4>(weights, tiles, x, stride, sums);
    default:
      return dot_run<kMostRows>(weights, tiles, x, stride, sums);
  }
}

// One row of tiles times `rows` rows of x from `first` on. `ready` holds the weights where several passes use
// them.
static void dot_row_tile(const BitsLinearParams& p, const Codes& x, const uint8_t* ready, int64_t row_tile,
                         int64_t first, int rows) {
  alignas(64) uint8_t run[kRunTiles * kTileBytes8];
  float total[kMostRows][16] = {}, scale[16], bias[16];
  const int64_t used = p.rows - first < rows ? p.rows - first : rows;
  const int64_t tiles = p.groups == 1 ? p.w.input_tiles : p.w.in_features / p.groups / kTileInputs;
  for (int64_t g = 0; g < p.groups; ++g) {
    int32_t sums[kMostRows][16] = {};
    const int64_t group_end = (g + 1) * tiles;
    for (int64_t t = g * tiles; t < group_end; t += kRunTiles) {
      const int64_t end = t + kRunTiles < group_end ? t + kRunTiles : group_end;
      const uint8_t* weights = ready ? ready + t * kTileBytes8 : decode_tiles(p.w, row_tile, t, end, run);
      dot_rows(weights, end - t, x.codes + first * x.padded_inputs + t * kTileInputs, x.padded_inputs, rows,
               sums);
    }
    if (p.kind == LinearKind::integers) {
      for (int64_t m = 0; m < used; ++m)
        store_integers(p, first + m, row_tile, sums[m], x.row_sum[first + m]);
      return;
    }
    load_scales(p, row_tile, g, scale);
    for (int64_t m = 0; m < used; ++m) {
      add_group(sums[m], x.row_sum[(first + m) * p.groups + g], scale, total[m]);
    }
  }
  load_bias(p, row_tile, bias);
  for (int64_t m = 0; m < used; ++m) finish_row(p, first + m, row_tile, x.scale[first + m], bias, total[m]);
}

static void linear_by_dots(const BitsLinearParams& p, const Codes& x) {
  const int pass = pass_rows(p.rows);
  const bool one_pass = p.rows <= pass;
  const int64_t scratch_bytes = one_pass ? 0 : p.w.input_tiles * kTileBytes8;
  share_row_tiles(p, 1, scratch_bytes, [&](int64_t begin, int64_t end, uint8_t* scratch) {
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      const uint8_t* ready = one_pass ? nullptr : decode_tiles(p.w, row_tile, 0, p.w.input_tiles, scratch);
      for (int64_t first = 0; first < p.rows; first += pass) dot_row_tile(p, x, ready, row_tile, first, pass);
    }
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA
