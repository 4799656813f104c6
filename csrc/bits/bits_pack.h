// Codes to planes: what a kernel of this op receives.
#pragma once

#include "bits/packed.h"

namespace tranche {

struct BitsPackParams {
  const int8_t* codes;  // [out_features, in_features], rows contiguous
  uint8_t* data;        // [512 * row_tiles * input_tiles] out, every byte written
  int64_t code_stride;  // of rows
  int64_t out_features, in_features, row_tiles, input_tiles;
  bool single;  // planes
};

// The four codes of a row from input `first` on, as bytes of u = W + 128; zero outside.
TRANCHE_HD uint32_t load_codes(const BitsPackParams& p, int64_t row, int64_t first) {
  uint32_t word = 0;
  if (row >= p.out_features) return 0;
  for (int j = 0; j < 4; ++j) {
    if (first + j < p.in_features) {
      word |= uint32_t(p.codes[row * p.code_stride + first + j] + 128) << (8 * j);
    }
  }
  return word;
}

// One row of one tile.
TRANCHE_HD void pack_tile_row(const BitsPackParams& p, int64_t tile, int row) {
  const int64_t output = tile / p.input_tiles * kTileRows + row, first = tile % p.input_tiles * kTileInputs;
  uint32_t u[8];
  for (int v = 0; v < 8; ++v) u[v] = load_codes(p, output, first + 4 * v);
  const int64_t tiles = p.row_tiles * p.input_tiles;
  uint32_t* words = reinterpret_cast<uint32_t*>(p.data);
  if (p.single) {
    for (int plane = 0; plane < 8; ++plane) {
      words[kPlaneBytes * (plane * tiles + tile) / 4 + row] = pack_plane(u, plane);
    }
    return;
  }
  const TileRow packed = pack_row(u);
  for (int q = 0; q < 2; ++q) {
    words[(tile * 128 + q * 64) / 4 + row] = packed.two[0][q];
    words[(tiles * 192 + tile * 128 + q * 64) / 4 + row] = packed.two[1][q];
    words[(tiles * 320 + tile * 128 + q * 64) / 4 + row] = packed.two[2][q];
  }
  words[(tiles * 128 + tile * 64) / 4 + row] = packed.one[0];
  words[(tiles * 448 + tile * 64) / 4 + row] = packed.one[1];
}

namespace cpu {
void bits_pack(const BitsPackParams&);
}  // namespace cpu

namespace cuda {
void bits_pack(const BitsPackParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
