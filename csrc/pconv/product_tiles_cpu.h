// The product of product_cpu.h on AMX tiles, for bf16 and, in three parts, for float. Include from amx
// translation units only.
//
// A float is taken in three parts (core/parts_cpu.h). Pixels are the rows of a left tile, 32 channels its
// columns; a panel of outputs is two right tiles.
#pragma once

#include "core/amx.h"
#include "core/parts_cpu.h"
#include "pconv/product_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int64_t kTilePixels = 16;
constexpr int64_t kTileUnits = 256;  // of a right tile: [16 units of depth][16 outputs]

// How many bf16 an element of type T is the sum of; 0 where tiles do not serve it.
template <class T>
struct PlanesOf {
  static constexpr int value = __is_same(T, bf16) ? 1 : __is_same(T, float) ? 3 : 0;
};

// 32 floats as bf16, or as three that are their sum.
template <int kPlanes>
TRANCHE_INLINE void split32(Vec low, Vec high, __m512i (&part)[kPlanes]) {
  if constexpr (kPlanes == 1) {
    part[0] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  } else {
    parts_of(low, high, part);
  }
}

template <int kPlanes>
TRANCHE_INLINE void split16(Vec x, __m256i (&part)[kPlanes]) {
  __m512i wide[kPlanes];
  split32(x, x, wide);
#pragma GCC unroll 3
  for (int p = 0; p < kPlanes; ++p) part[p] = _mm512_castsi512_si256(wide[p]);
}

// Tiles 0..3 for sums of `rows` pixels, 4 and 5 for pixels of `depth` units, 6 and 7 for as many units of
// weights. A product takes the longer the more rows it has.
TRANCHE_INLINE Tiles tiles_of(int64_t rows, int64_t depth) {
  const TileShape sums{rows, 64}, pixels{rows, 4 * depth}, weights{depth, 64};
  return Tiles({sums, sums, sums, sums, pixels, pixels, weights, weights});
}

// One panel of outputs for `blocks` blocks of `rows` pixels.
struct TileProduct {
  const uint32_t* x;           // the first part of the first pixel
  int64_t step, block, plane;  // units between pixels, between blocks of them, and between parts
  const int64_t* offset;       // [steps] units; the last of every `group` steps begins with `overlap` units
  int64_t steps, group, overlap;  // of the step before it, where the weights are 0
  int64_t depth;                  // units of a step
  const uint32_t* w;              // [steps][parts][2][16 units][16 outputs]
  const float* bias;              // [kPanel]
  float* out;                     // [blocks * rows][kPanel]
  int64_t blocks, rows;
  bool fetch_ahead;  // another panel's weights follow, and are next
  Ahead* ahead;      // what else to ask for, or null
};

// Tiles 0..3 are sums, 4 and 5 pixels, 6 and 7 weights: both columns' of a panel, or the one's in tile kW.
template <int kBlocks, int kColumns, bool kLoadX, bool kLoadW, int kW = 6>
TRANCHE_INLINE void tile_dots(const uint32_t* x, int64_t block, int64_t stride, const uint32_t* w) {
  static_assert(kBlocks * kColumns <= 4);
  constexpr bool kReload = kLoadX || kBlocks > 2;
  if constexpr (kLoadW) tile_load<kW>(w, 64);
  if constexpr (kLoadW && kColumns > 1) tile_load<7>(w + kTileUnits, 64);
  if constexpr (kReload) tile_load<4>(x, stride);
  tile_dot_bf16<0, 4, kW>();
  if constexpr (kColumns > 1) tile_dot_bf16<1, 4, 7>();
  if constexpr (kBlocks > 1) {
    if constexpr (kReload) tile_load<5>(x + block, stride);
    tile_dot_bf16<kColumns, 5, kW>();
    if constexpr (kColumns > 1) tile_dot_bf16<3, 5, 7>();
  }
  if constexpr (kBlocks > 2) {
    tile_load<4>(x + 2 * block, stride);
    tile_dot_bf16<2, 4, kW>();
  }
  if constexpr (kBlocks > 3) {
    tile_load<5>(x + 3 * block, stride);
    tile_dot_bf16<3, 5, kW>();
  }
}

template <int kPlanes, int kBlocks, int kColumns>
TRANCHE_INLINE void tile_block(const TileProduct& a, const uint32_t* x, float* out, Ahead& weights) {
  constexpr int kSums = kBlocks * kColumns;
  tile_load<0>(a.bias, 0);
  if constexpr (kSums > 1) tile_load<1>(a.bias + 16 * (1 % kColumns), 0);
  if constexpr (kSums > 2) tile_load<2>(a.bias, 0);
  if constexpr (kSums > 3) tile_load<3>(a.bias + 16 * (3 % kColumns), 0);
  const int64_t stride = a.step * 4, block = a.block;
  const uint32_t* w = a.w;
  const auto ask = [&] {
    weights.ask();
    if (a.ahead) a.ahead->ask();
  };
  for (int64_t s = 0; s < a.steps; ++s, w += kPlanes * 2 * kTileUnits) {
    const uint32_t* high = x + a.offset[s];
    if constexpr (kPlanes == 1) {
      tile_dots<kBlocks, kColumns, true, true>(high, block, stride, w);
      ask();
    } else {  // small terms first, in an order that loads one side at a time
      constexpr int kOther = kColumns == 1 ? 7 : 6;
      const uint32_t *middle = high + a.plane, *low = middle + a.plane;
      const uint32_t *w_middle = w + 2 * kTileUnits, *w_low = w_middle + 2 * kTileUnits;
      tile_dots<kBlocks, kColumns, true, true>(low, block, stride, w);
      ask();
      tile_dots<kBlocks, kColumns, true, false>(middle, block, stride, w);
      ask();
      tile_dots<kBlocks, kColumns, false, true, kOther>(middle, block, stride, w_middle);
      ask();
      tile_dots<kBlocks, kColumns, true, false, kOther>(high, block, stride, w_middle);
      ask();
      tile_dots<kBlocks, kColumns, false, true, kOther>(high, block, stride, w_low);
      ask();
      tile_dots<kBlocks, kColumns, false, kColumns != 1>(high, block, stride, w);
      ask();
    }
  }
  constexpr int64_t kStride = kPanel * 4;
  const int64_t next = a.rows * kPanel;
  tile_store<0>(out, kStride);
  if constexpr (kSums > 1) tile_store<1>(out + 1 / kColumns * next + 16 * (1 % kColumns), kStride);
  if constexpr (kSums > 2) tile_store<2>(out + 2 / kColumns * next, kStride);
  if constexpr (kSums > 3) tile_store<3>(out + 3 / kColumns * next + 16 * (3 % kColumns), kStride);
}

// Tiles of pixels that are multiplied together: more share the weights, but no more than two the pixels that
// several products take.
template <int kPlanes, int kColumns>
constexpr int64_t kTileBlocks = kPlanes == 1 ? 4 / kColumns : 2;

// How often a panel's product asks for what comes after it.
template <int kPlanes, int kColumns>
static int64_t tile_asks(int64_t blocks, int64_t steps) {
  constexpr int64_t kMost = kTileBlocks<kPlanes, kColumns>;
  return (blocks + kMost - 1) / kMost * steps * (kPlanes == 1 ? 1 : 6);
}

template <int kPlanes, int kColumns>
static void tile_columns(const TileProduct& a) {
  constexpr int64_t kMost = kTileBlocks<kPlanes, kColumns>;
  const uint32_t* x = a.x;
  float* out = a.out;
  int64_t left = a.blocks;
  // The next panel's weights, which follow, are asked for a line or two at a time: loads of tiles wait for
  // memory, and for many requests at once.
  const int64_t units = a.steps * kPlanes * 2 * kTileUnits;
  const int64_t asks = tile_asks<kPlanes, kColumns>(a.blocks, a.steps);
  Ahead weights;
  if (a.fetch_ahead) weights = Ahead(a.w + units, 1, 0, units * int64_t(sizeof *a.w), asks);
  for (; left >= kMost; left -= kMost, x += kMost * a.block, out += kMost * a.rows * kPanel) {
    tile_block<kPlanes, int(kMost), kColumns>(a, x, out, weights);
  }
  if constexpr (kMost > 2) {
    if (left == 3) return tile_block<kPlanes, 3, kColumns>(a, x, out, weights);
    if (left == 2) return tile_block<kPlanes, 2, kColumns>(a, x, out, weights);
  }
  if (left == 1) tile_block<kPlanes, 1, kColumns>(a, x, out, weights);
}

// The panel's first `columns` outputs, under tiles of a.depth; what is written beyond them is of no meaning.
template <int kPlanes>
static void product(const TileProduct& a, int64_t columns) {
  columns > 16 ? tile_columns<kPlanes, 2>(a) : tile_columns<kPlanes, 1>(a);
}

// ---- what is not finite: tiles know 0 * inf too, from empty and from parts that are 0

// Small parts first: the first and the second of the largest numbers add up to more than there is.
template <int kPlanes>
TRANCHE_INLINE float part_sum(const uint32_t* unit, int64_t plane, int half) {
  float sum = 0.0f;
  for (int i = kPlanes - 1; i >= 0; --i) {
    sum += bits_float(half ? unit[i * plane] & 0xffff0000u : unit[i * plane] << 16);
  }
  return sum;
}

template <int kPlanes>
TRANCHE_INLINE Vec part_sums(const uint32_t* units, int half) {
  Vec sum = vset(0.0f);
  for (int i = kPlanes - 1; i >= 0; --i) {
    const __m512i pairs = _mm512_loadu_si512(units + i * 2 * kTileUnits);
    const __m512i bits =
        half ? _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))) : _mm512_slli_epi32(pairs, 16);
    sum = vadd(sum, _mm512_castsi512_ps(bits));
  }
  return sum;
}

// 16 outputs of a pixel by plain FMAs.
template <int kPlanes>
static Vec chains_of(const TileProduct& a, int64_t pixel, int64_t output) {
  const uint32_t* x = a.x + pixel / a.rows * a.block + pixel % a.rows * a.step;
  const uint32_t* w = a.w + output / 16 * kTileUnits;
  Vec sum = vload(a.bias + output);
  for (int64_t s = 0; s < a.steps; ++s, w += kPlanes * 2 * kTileUnits) {
    for (int64_t u = s % a.group == a.group - 1 ? a.overlap : 0; u < a.depth; ++u) {
      for (int half = 0; half < 2; ++half) {
        const float value = part_sum<kPlanes>(x + a.offset[s] + u, a.plane, half);
        sum = vfma(vset(value), part_sums<kPlanes>(w + u * 16, half), sum);
      }
    }
  }
  return sum;
}

// Computes again what is not finite among the first `columns` outputs of pixels [first, first + count).
template <int kPlanes>
static void mend(const TileProduct& a, int64_t first, int64_t count, int64_t columns) {
  constexpr int kNotFinite = 0x99;
  float* sums = a.out + first * kPanel;
  for (int64_t i = first; i < first + count; ++i, sums += kPanel) {
    for (int64_t o = 0; o < columns; o += 16) {
      const Vec sum = vload(sums + o);
      const Mask bad = _mm512_fpclass_ps_mask(sum, kNotFinite);
      if (__builtin_expect(bad == 0, 1)) continue;
      vstore(sums + o, vselect(bad, chains_of<kPlanes>(a, i, o), sum));
    }
  }
}

// ---- weights

// Steps of at most 16 units through segments of `depth` units: all are as long, and where they do not add up
// the last of a segment begins within the one before.
struct TileSteps {
  int64_t segments, depth;  // units of a segment
  int64_t group, unit;      // steps of a segment, units of a step
  TileSteps(int64_t segments_, int64_t depth_)
      : segments(segments_), depth(depth_), group((depth_ + 15) / 16) {
    unit = depth % group == 0 ? depth / group : 16;
  }
  int64_t count() const { return segments * group; }
  int64_t overlap() const { return group > 1 ? group * unit - depth : 0; }
  int64_t begin(int64_t i) const { return least(i * unit, depth - unit); }
};

// Weights [n][depth][taps] as tiles of outputs [first, first + kPanel), taps one after the other along
// `steps`, which may be longer. `scratch` is floats or units: taps * depth * kPanel.
template <int kPlanes, class T>
static void pack_tiles(const T* weight, int64_t n, int64_t depth, int64_t taps, int64_t first,
                       const TileSteps& steps, uint32_t* scratch, uint32_t* to) {
  const int64_t tap_units = units<B16>(depth);
  if constexpr (kPlanes == 1) {
    pack_panel<B16>(weight, n, depth, taps, first, scratch);
  } else {
    pack_panel<F32>(weight, n, depth, taps, first, reinterpret_cast<float*>(scratch));
  }
  const int64_t columns = n - first > 16 ? 2 : 1;
  for (int64_t s = 0; s < steps.segments; ++s) {
    for (int64_t i = 0; i < steps.group; ++i, to += kPlanes * 2 * kTileUnits) {
      const int64_t begin = steps.begin(i);
      for (int64_t u = 0; u < steps.unit; ++u) {
        const int64_t at = s * steps.depth + begin + u, tap = at / tap_units, unit = at % tap_units;
        const bool empty = begin + u < i * steps.unit || tap >= taps;
        for (int64_t c = 0; c < columns; ++c) {
          uint32_t* row = to + c * kTileUnits + u * 16;
          if constexpr (kPlanes == 1) {
            const uint32_t* from = scratch + at * kPanel + c * 16;
            _mm512_storeu_si512(row, empty ? _mm512_setzero_si512() : _mm512_loadu_si512(from));
          } else {
            const float* from =
                reinterpret_cast<const float*>(scratch) + (tap * depth + 2 * unit) * kPanel + c * 16;
            Vec even[3], odd[3];
            parts_of(empty ? vset(0.0f) : vload(from), even);
            parts_of(empty || 2 * unit + 1 >= depth ? vset(0.0f) : vload(from + kPanel), odd);
            for (int p = 0; p < kPlanes; ++p) {
              const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even[p]), 16);
              _mm512_storeu_si512(row + p * 2 * kTileUnits,
                                  _mm512_or_si512(low, _mm512_castps_si512(odd[p])));
            }
          }
        }
      }
    }
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA
