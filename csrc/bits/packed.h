// Weights packed in planes: one stored integer of 8 bits serves every precision, and a kernel that computes
// in l bits reads l + 1 of them. docs/bits.md draws the layouts and says why l + 1 bits are enough.
//
// W is a code in [-128, 127], u = W + 128. The bits of u are cut into slices, each one contiguous stream of
// tiles of 16 rows (outputs) x 32 inputs, [row tile][input tile]; padding is zero bits. Guarded planes have
// five slices [u7u6 | u5 | u4u3 | u2u1 | u0], single planes eight of one bit. Within a tile, with input =
// 16 q + 4 s + j:
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

constexpr int kPlaneBytes = 64;  // of a tile
constexpr int kLayoutGuardedPlanes = 1;
constexpr int kLayoutSinglePlanes = 2;
constexpr int kLayoutPlain = 16;  // 16 + l: codes of l bits

// Outputs in tiles and inputs in tiles, as a kernel sees them.
struct PackedWeight {
  const uint8_t* data;  // [512 * row_tiles * input_tiles]
  int64_t out_features, in_features;
  int64_t row_tiles, input_tiles;
  int32_t bits;  // to compute in, 2..8
  int32_t
      planes;   // bits of u to read, the top ones: 3, 5, 7 or 8 guarded, 3..8 single; 0 for the plain layout
  bool single;  // planes
};

// How many bits of u come with the top l + 1.
TRANCHE_HD int planes_of_bits(int bits, bool single) {
  const int needed = bits < 8 ? bits + 1 : 8;
  return single || needed == 3 ? needed : needed <= 5 ? 5 : needed <= 7 ? 7 : 8;
}

// How many bits of u lie above a slice of the guarded planes.
TRANCHE_HD int bits_above(int slice) {
  return slice == 0 ? 0 : slice == 1 ? 2 : slice == 2 ? 3 : slice == 3 ? 5 : 7;
}

// The stream of one slice of the guarded planes, from one tile on.
TRANCHE_HD const uint8_t* slice_stream(const PackedWeight& w, int slice, int64_t tile) {
  const int64_t before = kPlaneBytes * bits_above(slice);
  const int64_t bytes = slice == 1 || slice == 4 ? kPlaneBytes : 2 * kPlaneBytes;
  return w.data + before * w.row_tiles * w.input_tiles + bytes * tile;
}

// The stream of one single plane, u7 the first. u5 and u0 lie where the guarded planes have them.
TRANCHE_HD const uint8_t* plane_stream(const PackedWeight& w, int plane, int64_t tile) {
  return w.data + kPlaneBytes * (plane * w.row_tiles * w.input_tiles + tile);
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

// The words of one row of a tile, guarded.
struct TileRow {
  uint32_t two[3][2];  // slices 0, 2, 3, by q
  uint32_t one[2];     // slices 1, 4
};

// Two single planes as one slice of two bits.
TRANCHE_HD uint32_t join_planes(uint32_t high, uint32_t low, int q) {
  return q == 0 ? (high << 1 & 0xaaaaaaaau) | (low & 0x55555555u)
                : (high & 0xaaaaaaaau) | (low >> 1 & 0x55555555u);
}

TRANCHE_HD TileRow join_row(const uint32_t (&plane)[8]) {
  TileRow row = {};
  for (int q = 0; q < 2; ++q) {
    row.two[0][q] = join_planes(plane[0], plane[1], q);
    row.two[1][q] = join_planes(plane[3], plane[4], q);
    row.two[2][q] = join_planes(plane[5], plane[6], q);
  }
  row.one[0] = plane[2];
  row.one[1] = plane[7];
  return row;
}

// A row's word of one single plane; u[v] holds the inputs 4v .. 4v+3 as bytes.
TRANCHE_HD uint32_t pack_plane(const uint32_t (&u)[8], int plane) {
  uint32_t word = 0;
  for (int v = 0; v < 8; ++v) word |= (u[v] >> (7 - plane) & 0x01010101u) << (2 * (v % 4) + v / 4);
  return word;
}

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
