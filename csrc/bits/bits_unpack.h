// Packed weights to codes, to floats, or to a plain copy for one precision: what a kernel of these ops
// receives.
#pragma once

#include "bits/packed.h"

namespace tranche {

enum class UnpackTo : int32_t {
  codes,   // W_l, int8
  plain,   // the plain layout
  floats,  // W_l * 2^(8-l) * scale, rounded once from float
};

struct BitsUnpackParams {
  PackedWeight w;
  const float* scale;  // [out_features, groups], floats only
  void* out;           // [out_features, in_features], or the plain layout
  int64_t groups;
  UnpackTo to;
  DType out_type;
};

// The float that W_l * 2^(8-l) stands for.
TRANCHE_HD float dequantized(const BitsUnpackParams& p, int32_t shifted_code, int64_t row, int64_t input) {
  const int64_t group = input / (p.w.in_features / p.groups);
  return float(shifted_code) * p.scale[row * p.groups + group];
}

// Writes the four inputs from `first` on of one row, given as rounded bytes: one word of a tile.
template <class T>
TRANCHE_HD void store_floats(const BitsUnpackParams& p, uint32_t word, int64_t row, int64_t first) {
  T* out = static_cast<T*>(p.out) + row * p.w.in_features;
  for (int j = 0; j < 4; ++j) {
    if (first + j >= p.w.in_features) return;
    const int32_t code = int32_t(word >> (8 * j) & 0xffu) - 128;
    out[first + j] = from_float<T>(dequantized(p, code, row, first + j));
  }
}

TRANCHE_HD void store_word(const BitsUnpackParams& p, uint32_t word, int64_t tile, int row, int v) {
  if (p.to == UnpackTo::plain) {
    static_cast<uint32_t*>(p.out)[tile * (kTileBytes8 / 4) + 16 * v + row] = word;
    return;
  }
  const int64_t output = tile / p.w.input_tiles * kTileRows + row;
  const int64_t first = tile % p.w.input_tiles * kTileInputs + 4 * v;
  if (output >= p.w.out_features) return;
  if (p.to == UnpackTo::codes) {
    int8_t* out = static_cast<int8_t*>(p.out) + output * p.w.in_features;
    for (int j = 0; j < 4 && first + j < p.w.in_features; ++j) {
      out[first + j] = int8_t((int32_t(word >> (8 * j) & 0xffu) - 128) >> (8 - p.w.bits));
    }
  } else if (p.out_type == DType::f32) {
    store_floats<float>(p, word, output, first);
  } else if (p.out_type == DType::f16) {
    store_floats<half>(p, word, output, first);
  } else {
    store_floats<bf16>(p, word, output, first);
  }
}

// A word of a tile's slice, zero for a slice that is not read.
TRANCHE_HD uint32_t slice_word(const PackedWeight& w, int slice, int64_t tile, int word) {
  if (bits_above(slice) >= w.planes) return 0;
  return reinterpret_cast<const uint32_t*>(slice_stream(w, slice, tile))[word];
}

TRANCHE_HD TileRow load_row(const PackedWeight& w, int64_t tile, int row) {
  if (w.single) {
    uint32_t plane[8];
    for (int i = 0; i < 8; ++i) {
      plane[i] = i < w.planes ? reinterpret_cast<const uint32_t*>(plane_stream(w, i, tile))[row] : 0;
    }
    return join_row(plane);
  }
  TileRow packed = {};
  for (int q = 0; q < 2; ++q) {
    packed.two[0][q] = slice_word(w, 0, tile, 16 * q + row);
    packed.two[1][q] = slice_word(w, 2, tile, 16 * q + row);
    packed.two[2][q] = slice_word(w, 3, tile, 16 * q + row);
  }
  packed.one[0] = slice_word(w, 1, tile, row);
  packed.one[1] = slice_word(w, 4, tile, row);
  return packed;
}

// One row of one tile.
TRANCHE_HD void unpack_tile_row(const BitsUnpackParams& p, int64_t tile, int row) {
  const Rounding rounding = rounding_of_bits(p.w.bits);
  const PackedWeight& w = p.w;
  if (w.planes == 0) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(w.data) + tile * (kTileBytes8 / 4);
    for (int v = 0; v < 8; ++v) store_word(p, words[16 * v + row], tile, row, v);
    return;
  }
  const TileRow packed = load_row(w, tile, row);
  for (int v = 0; v < 8; ++v) {
    store_word(p, round_word(unpack_word(packed, v / 4, v % 4), rounding), tile, row, v);
  }
}

namespace cpu {
void bits_unpack(const BitsUnpackParams&);
}  // namespace cpu

namespace cuda {
void bits_unpack(const BitsUnpackParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
