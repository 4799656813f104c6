// The AMX engine of the experts on the CPU for float weights and float columns.
//
// A float is the exact sum of three bf16, x = h + m + l, and w * x is taken as h*h + h*m + m*h + m*m + h*l +
// l*h: what is left out is below 2^-24 of it (Henry, Tang, Heinecke 2019, arXiv 1904.06376). Columns are
// split when they are packed, weights on their way into L1, a block of 16 rows by 32 k ahead of the products.
// What comes out not finite is computed again as FmaEngine would.
//
// A pair of bf16 is elements i and i + 16 of 32 k: two vectors of floats become one of pairs lane by lane.
#pragma once

#include "core/amx.h"
#include "moe/moe_engine_lanes_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

// The parts of 16 floats: bf16 in the upper halves of the lanes.
struct Parts {
  __m512i part[3];
};

constexpr int kUpperHalf = int(0xffff0000u);

TRANCHE_INLINE __m512i nearest_bf16(Vec x) {  // ties away from zero
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_and_si512(bits, _mm512_set1_epi32(kUpperHalf));
}

// Of what is not finite, or is rounded to infinity, at least one part is not finite.
TRANCHE_INLINE Parts parts_of(Vec x) {
  const __m512i high = nearest_bf16(x);
  const Vec rest = vsub(x, _mm512_castsi512_ps(high));
  const __m512i middle = nearest_bf16(rest);
  return {{high, middle, _mm512_castps_si512(vsub(rest, _mm512_castsi512_ps(middle)))}};
}

// The same, and the sum of the parts is the value even where it is not finite.
TRANCHE_INLINE Parts recoverable_parts_of(Vec x) {
  Parts p = parts_of(x);
  const __m512i bits = _mm512_castps_si512(x), magnitude = _mm512_castps_si512(vabs(x));
  const Mask large = _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(0x7f7f8000));
  if (__builtin_expect(large != 0, 0)) {
    const Mask infinite = _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    const Mask nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    const __m512i quiet = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x00400000));
    const __m512i cut = _mm512_and_si512(quiet, _mm512_set1_epi32(kUpperHalf));
    const Parts rest = parts_of(_mm512_maskz_sub_ps(Mask(~infinite), x, _mm512_castsi512_ps(cut)));
    p.part[0] = _mm512_mask_mov_epi32(p.part[0], large, cut);
    p.part[1] = _mm512_mask_mov_epi32(p.part[1], large, rest.part[0]);
    p.part[2] = _mm512_mask_mov_epi32(p.part[2], large, rest.part[1]);
  }
  return p;
}

TRANCHE_INLINE __m512i in_pairs(__m512i first, __m512i second) {
  return _mm512_mask_mov_epi16(second, 0x55555555, _mm512_srli_epi32(first, 16));
}

class SplitAmxEngine {
 public:
  using Compute = float;
  using Session = Tiles;

  static int64_t panel_bytes(int depth) { return round_up(depth, kStep) / kStep * kStepBytes; }
  static int64_t scratch_bytes() { return kRing * kStepBytes + kTileBytes; }

  static void pack(const float* const (&rows)[kPanel], int depth, void* panel) {
    char* to = static_cast<char*>(panel);
    for (int k = 0; k < depth; k += kStep, to += kStepBytes) {
      const Mask first = first_lanes(depth - k), second = first_lanes(depth - k - 16);
      __m512i block[3][kPanel];
      for (int c = 0; c < kPanel; ++c) {
        Parts a{}, b{};
        if (rows[c]) {
          a = recoverable_parts_of(_mm512_maskz_loadu_ps(first, rows[c] + k));
          b = recoverable_parts_of(_mm512_maskz_loadu_ps(second, rows[c] + k + 16));
        }
        for (int p = 0; p < 3; ++p) block[p][c] = in_pairs(a.part[p], b.part[p]);
      }
      for (int p = 0; p < 3; ++p) {
        transpose16(block[p]);
        for (int pair = 0; pair < 16; ++pair) {
          _mm512_storeu_si512(to + p * kTileBytes + pair * 64, block[p][pair]);
        }
      }
    }
  }

  static void put(void* panel, int, int column, int first_row, const float* values) {
    const Parts from = recoverable_parts_of(vload(values));
    uint16_t* to = reinterpret_cast<uint16_t*>(static_cast<char*>(panel) + first_row / kStep * kStepBytes) +
                   2 * column + first_row % kStep / 16;
    for (int p = 0; p < 3; ++p, to += kTileBytes / 2) {
      uint16_t halves[32];
      memcpy(halves, &from.part[p], sizeof halves);
      for (int i = 0; i < 16; ++i) to[i * 32] = halves[2 * i + 1];
    }
  }

  static void product(const Rows<float>& w, int first_row, const void* panels, int columns, float* result,
                      void* scratch, const float* next) {
    const char* x = static_cast<const char*>(panels);
    char* ring = static_cast<char*>(scratch);
    switch ((columns + kPanel - 1) / kPanel) {
      case 1:
        product_of<1>(w, first_row, x, result, ring, next);
        break;
      case 2:
        product_of<2>(w, first_row, x, result, ring, next);
        break;
      case 3:
        product_of<3>(w, first_row, x, result, ring, next);
        break;
      case 4:
        product_of<4>(w, first_row, x, result, ring, next);
    }
    mend(w, first_row, x, columns, result);
  }

 private:
  static constexpr int kStep = 32;  // k of one tile
  static constexpr int kStepBytes = 3 * kTileBytes;
  static constexpr int kRing = 2;  // blocks of weights: one that is multiplied and one that is split

  static Mask first_lanes(int64_t n) { return n >= 16 ? Mask(~0) : n <= 0 ? Mask(0) : Mask((1u << n) - 1u); }

  TRANCHE_INLINE void split(Vec first, Vec second, char* to) {
    const Parts a = parts_of(first), b = parts_of(second);
#pragma GCC unroll 3
    for (int p = 0; p < 3; ++p) _mm512_storeu_si512(to + p * kTileBytes, in_pairs(a.part[p], b.part[p]));
  }

  // A whole block of weights on its way, and the rows that are read after these, or null.
  struct Source {
    const float *w, *next;
    int64_t stride;  // elements
    char* to;
  };

  template <int kFrom, int kTo>
  TRANCHE_INLINE void split_rows(const Source& s) {
#pragma GCC unroll 16
    for (int r = kFrom; r < kTo; ++r) {
      const float* row = s.w + r * s.stride;
      split(vload(row), vload(row + 16), s.to + r * 64);
      if (s.next) {
        __builtin_prefetch(s.next + r * s.stride, 0, kWeightsLocality);
        __builtin_prefetch(s.next + r * s.stride + 16, 0, kWeightsLocality);
      }
    }
  }

  static void split_edge(const Rows<float>& w, int first_row, int k, char* to) {
    const Mask first = first_lanes(w.columns - k), second = first_lanes(w.columns - k - 16);
    const int rows = least(w.rows - first_row, kTileRows);
    for (int r = 0; r < kTileRows; ++r) {
      const float* row = w.row(first_row + least(r, rows - 1)) + k;
      const Vec a = _mm512_maskz_loadu_ps(r < rows ? first : Mask(0), row);
      const Vec b = _mm512_maskz_loadu_ps(r < rows ? second : Mask(0), row + 16);
      split(a, b, to + r * 64);
    }
  }

  // Tiles 0..3 are the accumulators of the panels, 4 to 6 the parts of weights, 7 columns. The low parts of
  // columns meet the high ones of weights, the middle ones two, the high ones three.
  template <int kPanels, int kTile>
  TRANCHE_INLINE void dots(const char* x, int64_t panel, int part) {
    if constexpr (kTile < kPanels) {
      tile_load<7>(x + kTile * panel + part * kTileBytes, 64);
      if (part == 0) tile_dot_bf16<kTile, 6, 7>();
      if (part <= 1) tile_dot_bf16<kTile, 5, 7>();
      tile_dot_bf16<kTile, 4, 7>();
    }
  }

  template <int kPanels, bool kSplit>
  TRANCHE_INLINE void step(const char* w, const char* x, int64_t panel, const Source& source) {
    tile_load<4>(w, 64);
    tile_load<5>(w + kTileBytes, 64);
    tile_load<6>(w + 2 * kTileBytes, 64);
    dots<kPanels, 0>(x, panel, 2);
    dots<kPanels, 1>(x, panel, 2);
    dots<kPanels, 2>(x, panel, 2);
    dots<kPanels, 3>(x, panel, 2);
    if constexpr (kSplit) split_rows<0, 3>(source);
    dots<kPanels, 0>(x, panel, 1);
    dots<kPanels, 1>(x, panel, 1);
    if constexpr (kSplit) split_rows<3, 6>(source);
    dots<kPanels, 2>(x, panel, 1);
    dots<kPanels, 3>(x, panel, 1);
    if constexpr (kSplit) split_rows<6, 9>(source);
    dots<kPanels, 0>(x, panel, 0);
    if constexpr (kSplit) split_rows<9, 11>(source);
    dots<kPanels, 1>(x, panel, 0);
    if constexpr (kSplit) split_rows<11, 13>(source);
    dots<kPanels, 2>(x, panel, 0);
    if constexpr (kSplit) split_rows<13, 16>(source);
    dots<kPanels, 3>(x, panel, 0);
  }

  template <int kPanels>
  static void product_of(const Rows<float>& w, int first_row, const char* x, float* result, char* ring,
                         const float* next) {
    const int64_t panel = panel_bytes(w.columns);
    const int steps = int(panel / kStepBytes),
              whole = w.rows - first_row >= kTileRows ? w.columns / kStep : 0;
    TRANCHE_TILE_ZERO(0);
    if constexpr (kPanels > 1) TRANCHE_TILE_ZERO(1);
    if constexpr (kPanels > 2) TRANCHE_TILE_ZERO(2);
    if constexpr (kPanels > 3) TRANCHE_TILE_ZERO(3);
    const float* rows = w.row(first_row);
    const auto block = [ring](int i) { return ring + i % kRing * kStepBytes; };
    const auto source = [&](int i) {
      return Source{rows + i * kStep, next ? next + i * kStep : nullptr, w.stride, block(i)};
    };
    whole ? split_rows<0, 16>(source(0)) : split_edge(w, first_row, 0, block(0));
    for (int i = 0; i < steps; ++i, x += kStepBytes) {
      if (i + 1 < whole) {
        step<kPanels, true>(block(i), x, panel, source(i + 1));
      } else {
        if (i + 1 < steps) split_edge(w, first_row, (i + 1) * kStep, block(i + 1));
        step<kPanels, false>(block(i), x, panel, Source{});
      }
    }
    float* tile = reinterpret_cast<float*>(ring + kRing * kStepBytes);
    store<0>(tile, result);
    if constexpr (kPanels > 1) store<1>(tile, result);
    if constexpr (kPanels > 2) store<2>(tile, result);
    if constexpr (kPanels > 3) store<3>(tile, result);
  }

  // The accumulator is [row][column]; the result [column][row].
  template <int kTile>
  TRANCHE_INLINE void store(float* tile, float* result) {
    tile_store<kTile>(tile, 64);
    __m512i block[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) block[i] = _mm512_loadu_si512(tile + i * 16);
    transpose16(block);
    float* to = result + kTile * kPanel * kTileRows;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 16, block[i]);
  }

  // Tiles know 0 * inf too, of parts that are 0 and of rows beyond the matrix.
  static void mend(const Rows<float>& w, int first_row, const char* panels, int columns, float* result) {
    constexpr int kNotFinite = 0x99;
    const Mask rows = first_lanes(w.rows - first_row);
    for (int c = 0; c < columns; ++c, result += kTileRows) {
      const Vec sums = vload(result);
      const Mask bad = _mm512_fpclass_ps_mask(sums, kNotFinite);
      if (__builtin_expect(bad == 0, 1)) continue;
      float again[kTileRows] = {};
      if (bad & rows) chains(w, first_row, Mask(bad & rows), column_of(panels, w.columns, c), again);
      vstore(result, vselect(bad, vload(again), sums));
    }
  }

  static const char* column_of(const char* panels, int depth, int column) {
    return panels + column / kPanel * panel_bytes(depth) + column % kPanel * 4;
  }

  // The 16 elements of a column that are half a step.
  static Vec values_of(const char* column, int k) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const char* from = column + k / kStep * kStepBytes;
    Vec sum = vset(0.0f);
    for (int p = 0; p < 3; ++p, from += kTileBytes) {
      const __m512i pairs = _mm512_i32gather_epi32(_mm512_slli_epi32(lanes, 6), from, 1);
      const __m512i bits =
          k % kStep ? _mm512_and_si512(pairs, _mm512_set1_epi32(kUpperHalf)) : _mm512_slli_epi32(pairs, 16);
      sum = vadd(sum, _mm512_castsi512_ps(bits));
    }
    return sum;
  }

  static void chains(const Rows<float>& w, int first_row, Mask chosen, const char* column, float* sums) {
    float lanes[kTileRows][kWidth] = {};
    for (int k = 0; k < w.columns; k += kWidth) {
      const Mask left = first_lanes(w.columns - k);
      const Vec x = values_of(column, k);
      for (int r = 0; r < kTileRows; ++r) {
        if (!(chosen >> r & 1)) continue;
        const Vec row = _mm512_maskz_loadu_ps(left, w.row(first_row + r) + k);
        vstore(lanes[r], vfma(row, x, vload(lanes[r])));
      }
    }
    const float* vectors[16];
    for (int r = 0; r < kTileRows; ++r) vectors[r] = lanes[r];
    add_lanes(vectors, sums);
  }
};

}  // namespace tranche::cpu::TRANCHE_ISA
