// Integer activations by AMX tiles: 32 rows of x times 32 outputs in four accumulators.
//
// A tile of x is 16 rows of 64 inputs. Two tiles of weights in the plain layout are 16 groups of four inputs
// for 16 outputs, exactly what the instruction takes as its second operand.
#pragma once

#include "bits/bits_linear_cpu.h"
#include "core/amx.h"

namespace tranche::cpu::TRANCHE_ISA {

// Sums over the steps [begin, end) of 64 inputs. a0 and a1 are tiles of x one kTileBytes after another, b0
// and b1 weights; sums[2 i + o] gets x tile i times weights o.
static void tile_sums(const int8_t* a0, const int8_t* a1, const uint8_t* b0, const uint8_t* b1, int64_t begin,
                      int64_t end, int32_t (&sums)[4][256]) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t k = begin * kTileBytes; k < end * kTileBytes; k += kTileBytes) {
    tile_load<4>(a0 + k, 64);
    tile_load<6>(b0 + k, 64);
    tile_load<7>(b1 + k, 64);
    tile_dot_s8u8<0, 4, 6>();
    tile_dot_s8u8<1, 4, 7>();
    if (a1) {
      tile_load<5>(a1 + k, 64);
      tile_dot_s8u8<2, 5, 6>();
      tile_dot_s8u8<3, 5, 7>();
    }
  }
  tile_store<0>(sums[0], 64);
  tile_store<1>(sums[1], 64);
  tile_store<2>(sums[2], 64);
  tile_store<3>(sums[3], 64);
}

// 32 outputs from `row_tile` on (or 16, where `outputs` is one row of tiles), 32 rows of x from `first` on.
static void tile_block(const BitsLinearParams& p, const Activations& x, const uint8_t* b0, const uint8_t* b1,
                       int64_t row_tile, int outputs, int64_t first) {
  alignas(64) int32_t sums[4][256];
  const int64_t stripe = x.padded_inputs * 16;
  const int8_t* a0 = static_cast<const int8_t*>(x.x) + first / 16 * stripe;
  const int8_t* a1 = first + 16 < x.padded_rows ? a0 + stripe : nullptr;
  const int64_t steps = x.padded_inputs / 64, used = p.rows - first < 32 ? p.rows - first : 32;
  if (p.kind == LinearKind::integers) {
    tile_sums(a0, a1, b0, b1, 0, steps, sums);
    for (int64_t m = 0; m < used; ++m) {
      for (int o = 0; o < outputs; ++o) {
        store_integers(p, first + m, row_tile + o, &sums[m / 16 * 2 + o][m % 16 * 16], x.row_sum[first + m]);
      }
    }
    return;
  }
  float total[2][32][16] = {}, scale[16], bias[16];
  const int64_t group_steps = p.groups == 1 ? steps : p.w.in_features / p.groups / 64;
  for (int64_t g = 0; g < p.groups; ++g) {
    tile_sums(a0, a1, b0, b1, g * group_steps, (g + 1) * group_steps, sums);
    for (int o = 0; o < outputs; ++o) {
      load_scales(p, row_tile + o, g, scale);
      for (int64_t m = 0; m < used; ++m) {
        const int32_t row_sum = x.row_sum[(first + m) * p.groups + g];
        add_integer_group(&sums[m / 16 * 2 + o][m % 16 * 16], row_sum, scale, total[o][m]);
      }
    }
  }
  for (int o = 0; o < outputs; ++o) {
    load_bias(p, row_tile + o, bias);
    for (int64_t m = 0; m < used; ++m) {
      finish_row(p, first + m, row_tile + o, x.scale[first + m], bias, total[o][m]);
    }
  }
}

// Weights ready for tiles: where they are, or decoded to `to`, an odd last tile of inputs followed by zeros.
static const uint8_t* tile_weights(const PackedWeight& w, int64_t row_tile, uint8_t* to) {
  const uint8_t* weights = decode_tiles(w, row_tile, 0, w.input_tiles, 8, to);
  if (w.input_tiles % 2 == 0) return weights;
  if (weights != to) __builtin_memcpy(to, weights, size_t(w.input_tiles * kTileBytes8));
  __builtin_memset(to + w.input_tiles * kTileBytes8, 0, kTileBytes8);
  return to;
}

static int64_t tiles_scratch(const BitsLinearParams& p, int64_t padded_inputs) {
  return workers(p, 2) * 2 * padded_inputs * kTileRows;
}

static void linear_by_tiles(const BitsLinearParams& p, const Activations& x) {
  const int64_t stripe = x.padded_inputs * kTileRows;
  share_row_tiles(p, 2, x, 2 * stripe, [&](int64_t begin, int64_t end, uint8_t* scratch) {
    const Tiles tiles;
    for (int64_t row_tile = begin; row_tile < end; row_tile += 2) {
      const int outputs = end - row_tile >= 2 ? 2 : 1;
      const uint8_t* b0 = tile_weights(p.w, row_tile, scratch);
      const uint8_t* b1 = outputs == 2 ? tile_weights(p.w, row_tile + 1, scratch + stripe) : b0;
      for (int64_t first = 0; first < p.rows; first += 32) tile_block(p, x, b0, b1, row_tile, outputs, first);
    }
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA
