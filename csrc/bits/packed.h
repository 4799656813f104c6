// Weights packed in guarded planes: one stored integer of 8 bits serves every precision, and a kernel that
// computes in l bits reads l + 1 of them. docs/bits.md draws the layout and says why l + 1 bits are enough.
//
// W is a code in [-128, 127], u = W + 128. The bits of u are cut into five slices [u7u6 | u5 | u4u3 | u2u1 |
// u0], each one contiguous stream of tiles of 16 rows (outputs) x 32 inputs, [row tile][input tile]; padding
// is zero bits. Within a tile, with input = 16 q + 4 s + j:
//   a slice of two bits has 128 bytes: bits 2s and 2s+1 of byte 64 q + 4 row + j
//   a slice of one bit has 64 bytes:   bit 2s+q of byte 4 row + j
// The plain layout, a copy for one precision, has 512 bytes a tile: byte 64 (4q+s) + 4 row + j is the rounded
// code times 2^(8-l), plus 128.
#pragma once

#include <cstdint>

#include "core/numeric.h"

namespace tranche {

constexpr int kTileRows = 16;
constexpr int kTileInputs = 32;
constexpr int kTileBytes8 = kTileRows * kTileInputs;  // a tile at 8 bits

constexpr int kAllSlices = 5;
constexpr int kLayoutGuardedPlanes = 1;
constexpr int kLayoutPlain = 16;  // 16 + l: codes of l bits

// Outputs in tiles and inputs in tiles, as a kernel sees them.
struct PackedWeight {
  const uint8_t* data;  // [512 * row_tiles * input_tiles]
  int64_t out_features, in_features;
  int64_t row_tiles, input_tiles;
  int32_t bits;    // to compute in, 2..8
  int32_t slices;  // to read: 2..5 of the guarded planes, 0 for the plain layout
};

// How many slices hold the top l + 1 bits.
TRANCHE_HD int slices_of_bits(int bits) { return bits == 2 ? 2 : bits <= 4 ? 3 : bits <= 6 ? 4 : 5; }

// The stream of one slice, from one tile on.
TRANCHE_HD const uint8_t* slice_stream(const PackedWeight& w, int slice, int64_t tile) {
  const int64_t before = slice == 0 ? 0 : slice == 1 ? 128 : slice == 2 ? 192 : slice == 3 ? 320 : 448;
  const int64_t bytes = slice == 1 || slice == 4 ? 64 : 128;
  return w.data + before * w.row_tiles * w.input_tiles + bytes * tile;
}

// Rounding to l bits in place of the top bits of a byte: add half a step, saturate, keep l bits. What results
// is W_l * 2^(8-l) + 128.
struct Rounding {
  uint32_t half, keep;  // one byte, four times
};

TRANCHE_HD Rounding rounding_of_bits(int bits) {
  const uint32_t half = bits == 8 ? 0 : 1u << (7 - bits), keep = (0xff00u >> bits) & 0xffu;
  return {half * 0x01010101u, keep * 0x01010101u};
}

TRANCHE_HD int32_t round_code(int32_t code, int bits) {
  if (bits == 8) return code;
  const int32_t rounded = (code + (1 << (7 - bits))) >> (8 - bits), top = (1 << (bits - 1)) - 1;
  return rounded < top ? rounded : top;
}

// Four bytes at once: (x + half) saturated at 255, & keep. Bits below the lowest of `half` may be anything.
TRANCHE_HD uint32_t round_word(uint32_t x, Rounding r) {
  if (r.half == 0) return x;
  const uint32_t known = x & ~(r.half - 0x01010101u);  // the top l + 1 bits
  const uint32_t low = (known & 0x7f7f7f7fu) + r.half;
  const uint32_t sum = low ^ (known & 0x80808080u);
  const uint32_t full = low & known & 0x80808080u;  // overflow: all of the top bits were ones
  return (sum | full | (full - (full >> 7))) & r.keep;
}

// The words of one row of a tile: u[v] holds the inputs 4v .. 4v+3 as bytes.
struct TileRow {
  uint32_t two[3][2];  // slices 0, 2, 3, by q
  uint32_t one[2];     // slices 1, 4
};

TRANCHE_HD TileRow pack_row(const uint32_t (&u)[8]) {
  TileRow row = {};
  for (int q = 0; q < 2; ++q) {
    for (int s = 0; s < 4; ++s) {
      const uint32_t bytes = u[4 * q + s];
      row.two[0][q] |= (bytes >> 6 & 0x03030303u) << (2 * s);
      row.two[1][q] |= (bytes >> 3 & 0x03030303u) << (2 * s);
      row.two[2][q] |= (bytes >> 1 & 0x03030303u) << (2 * s);
      row.one[0] |= (bytes >> 5 & 0x01010101u) << (2 * s + q);
      row.one[1] |= (bytes & 0x01010101u) << (2 * s + q);
    }
  }
  return row;
}

// The bytes of inputs 16q + 4s .. +3 of a row, from the slices that were read; the others' bits are zero.
TRANCHE_HD uint32_t unpack_word(const TileRow& row, int q, int s) {
  return (row.two[0][q] >> (2 * s) & 0x03030303u) << 6 | (row.one[0] >> (2 * s + q) & 0x01010101u) << 5 |
         (row.two[1][q] >> (2 * s) & 0x03030303u) << 3 | (row.two[2][q] >> (2 * s) & 0x03030303u) << 1 |
         (row.one[1] >> (2 * s + q) & 0x01010101u);
}

}  // namespace tranche
