// The AMX engine of the experts on the CPU for columns of float: tiles know bf16, and a float is the exact
// sum of three (core/parts_cpu.h). Six products of tiles then take 0.4 of the time of FMAs.
//
// Weight rows are the M side, put in parts on their way; columns are kept as pairs of k,
// [depth / 32][3 parts][16 pairs][16 columns].
#pragma once

#include "core/parts_cpu.h"
#include "moe/moe_engine_lanes_cpu.h"
#include "moe/moe_sums_amx_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

// How many bf16 a weight is the exact sum of: 24, 11 and 8 bits of significand.
template <class W>
constexpr int kWeightParts = __is_same(W, float)  ? 3
                             : __is_same(W, half) ? 2
                                                  : 1;

class PartsEngine {
 public:
  using Compute = float;
  using Session = Tiles;
  static constexpr int kTilesTogether = 16;  // as many as their columns, in the second-level cache, are worth

  static int64_t panel_bytes(int depth) { return (depth + kStep - 1) / kStep * kColumnBytes; }
  static int64_t scratch_bytes() {
    return kStagedBytes + kTilesTogether * kSums * int64_t(sizeof(float)) + kTileBytes;
  }

  template <class T>
  static void pack(const T* const (&rows)[kPanel], int depth, void* panel) {
    char* to = static_cast<char*>(panel);
    for (int k = 0; k < depth; k += kStep, to += kColumnBytes) {
      const int left = least(depth - k, kStep);
      __m512i block[kParts][kPanel];
      for (int c = 0; c < kPanel; ++c) {
        __m512i part[kParts];
        parts_of(rows[c] ? load_first(rows[c] + k, left) : vset(0.0f),
                 rows[c] ? load_first(rows[c] + k + 16, left - 16) : vset(0.0f), part);
        for (int p = 0; p < kParts; ++p) block[p][c] = part[p];
      }
      for (int p = 0; p < kParts; ++p) {
        transpose16(block[p]);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + p * kTileBytes + i * 64, block[p][i]);
      }
    }
  }

  static void put(void* panel, int, int column, int first_row, const float* values) {
    __m512i part[kParts];
    parts_of(vload(values), vset(0.0f), part);
    char* to = static_cast<char*>(panel) + first_row / kStep * kColumnBytes + first_row % kStep / 2 * 64;
    for (int p = 0; p < kParts; ++p, to += kTileBytes) {
      uint32_t pairs[8];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs), _mm512_castsi512_si256(part[p]));
      for (int i = 0; i < 8; ++i) memcpy(to + i * 64 + column * 4, pairs + i, 4);
    }
  }

  // Of up to kTilesTogether tiles of rows, as far as the matrix has any: result[tile][column][row].
  template <class W>
  static void product(const Rows<W>& w, int first_row, const void* panels, int columns, float* result,
                      void* scratch, const W* next) {
    const char* x = static_cast<const char*>(panels);
    char* staged = static_cast<char*>(scratch);
    with_panels(columns, [&](auto count) {
      product_of<decltype(count)::value>(w, first_row, x, columns, result, staged, next);
    });
    for (int row = first_row; row < end_of_task(w, first_row); row += kTileRows) {
      for (int c = 0; c < columns; ++c, result += kTileRows) mend(w, row, x, c, result);
    }
  }

 private:
  static constexpr int kParts = 3;
  static constexpr int kStep = 32;  // k of one tile
  static constexpr int kColumnBytes = kParts * kTileBytes;
  static constexpr int kSums = kGroupColumns * kTileRows;
  static constexpr int kStagedBytes = 2 * kColumnBytes;  // of two steps
  static constexpr int kAhead = 8;                       // steps that weights are asked for before their use
  // Columns that the second-level cache keeps while all weights pass by, and as many steps of 64 columns as
  // it surely keeps.
  static constexpr int kFewBytes = 1 << 20, kChunkSteps = 32;

  template <class W>
  TRANCHE_INLINE int end_of_task(const Rows<W>& w, int first_row) {
    return least(w.rows, first_row + kTilesTogether * kTileRows);
  }

  // The first n of 16 elements, all if there are more.
  template <class T>
  TRANCHE_INLINE Vec load_first(const T* p, int n) {
    return n >= 16 ? FmaLanes::load(p) : n > 0 ? FmaLanes::load_first(p, n) : vset(0.0f);
  }

  // The first n weights of 32 in parts: those of parts_of, but for what is not finite, which mend() sees to.
  template <class W>
  TRANCHE_INLINE void stage(const W* from, int n, char* to) {
    Vec low = load_first(from, n), high = load_first(from + 16, n - 16);
    if constexpr (kWeightParts<W> == 1) {
      const __m512bh part = _mm512_cvtne2ps_pbh(high, low);
      memcpy(to, &part, sizeof part);
      return;
    }
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u)), half = _mm512_set1_epi32(0x8000);
    const auto rest = [&](Vec x, __m512i bits) {
      return vsub(x, _mm512_castsi512_ps(_mm512_and_si512(bits, upper)));
    };
    put_part(low, high, to);
    low = rest(low, _mm512_castps_si512(low));
    high = rest(high, _mm512_castps_si512(high));
    const __m512i rounded_low = _mm512_add_epi32(_mm512_castps_si512(low), half);
    const __m512i rounded_high = _mm512_add_epi32(_mm512_castps_si512(high), half);
    put_part(_mm512_castsi512_ps(rounded_low), _mm512_castsi512_ps(rounded_high), to + kTileBytes);
    if constexpr (kWeightParts<W> == 3) {
      put_part(rest(low, rounded_low), rest(high, rounded_high), to + 2 * kTileBytes);
    }
  }
  TRANCHE_INLINE void put_part(Vec low, Vec high, char* to) {
    _mm512_storeu_si512(to, upper_halves(low, high));
  }
  // Column tile after column tile, small products first: the sum is rounded least while it is large.
  // Tiles 4..6 are the weights' parts, 7 a column's.
  template <int kSum, int kWeights>
  TRANCHE_INLINE void meet(const char* x) {
    tile_load<7>(x + 2 * kTileBytes, 64);
    tile_dot_bf16<kSum, 4, 7>();
    tile_load<7>(x + kTileBytes, 64);
    if constexpr (kWeights > 1) tile_dot_bf16<kSum, 5, 7>();
    tile_dot_bf16<kSum, 4, 7>();
    tile_load<7>(x, 64);
    if constexpr (kWeights > 2) tile_dot_bf16<kSum, 6, 7>();
    if constexpr (kWeights > 1) tile_dot_bf16<kSum, 5, 7>();
    tile_dot_bf16<kSum, 4, 7>();
  }

  // One step of all panels. After each panel's products stage(first, end) puts some rows of the next step in
  // parts: the processor runs the two beside each other only if neither is long.
  template <int kPanels, int kWeights, class Stage>
  TRANCHE_INLINE void step(const char* w, const char* x, int64_t panel, const Stage& stage) {
    tile_load<4>(w, 64);
    if constexpr (kWeights > 1) tile_load<5>(w + kTileBytes, 64);
    if constexpr (kWeights > 2) tile_load<6>(w + 2 * kTileBytes, 64);
    constexpr int kRows = kTileRows / kPanels;
    meet<0, kWeights>(x);
    stage(0, kPanels > 1 ? kRows : kTileRows);
    if constexpr (kPanels > 1) {
      meet<1, kWeights>(x + panel);
      stage(kRows, kPanels > 2 ? 2 * kRows : kTileRows);
    }
    if constexpr (kPanels > 2) {
      meet<2, kWeights>(x + 2 * panel);
      stage(2 * kRows, kPanels > 3 ? 3 * kRows : kTileRows);
    }
    if constexpr (kPanels > 3) {
      meet<3, kWeights>(x + 3 * panel);
      stage(3 * kRows, kTileRows);
    }
  }

  // Elements k .. k + 31 of rows [begin, end) of 16, zeros beyond the matrix. As many from `ask` on are asked
  // for.
  template <class W>
  TRANCHE_INLINE void stage_rows(const Rows<W>& w, int first_row, int begin, int end, int k, const W* ask,
                                 char* to) {
    const int count = w.columns - k, rows = w.rows - first_row;
    const W* row = w.row(first_row + begin) + k;
    to += begin * 64;
    if (rows < kTileRows || count < kStep) {
      for (int r = begin; r < end; ++r, row += w.stride, to += 64) stage(row, r < rows ? count : 0, to);
      return;
    }
    ask += begin * w.stride;
#pragma GCC unroll 4
    for (int r = begin; r < end; ++r, row += w.stride, ask += w.stride, to += 64) {
      for (int i = 0; i < kStep * int(sizeof(W)); i += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(ask) + i, 0, 2);
      }
      stage(row, kStep, to);
    }
  }

  // Where columns are many, all rows of the task meet a chunk of them while the second-level cache holds it,
  // and sums wait in memory.
  template <int kPanels, class W>
  static void product_of(const Rows<W>& w, int first_row, const char* x, int columns, float* result,
                         char* scratch, const W* next) {
    const int steps = (w.columns + kStep - 1) / kStep;
    const int chunk = kPanels * steps * kColumnBytes <= kFewBytes ? steps : kChunkSteps;
    const int last_row = end_of_task(w, first_row);
    const int64_t panel = panel_bytes(w.columns);
    float* waiting = reinterpret_cast<float*>(scratch + kStagedBytes);
    float* tile = waiting + kTilesTogether * kSums;
    for (int first = 0; first < steps; first += chunk) {
      const int end = least(first + chunk, steps);
      for (int t = 0, row = first_row; row < last_row; ++t, row += kTileRows) {
        // what follows: the next rows of this chunk, the next chunk, or what comes next
        const W* following = row + 2 * kTileRows <= last_row ? w.row(row + kTileRows) + first * kStep
                             : end < steps                   ? w.row(first_row) + end * kStep
                                                             : next;
        first == 0 ? clear_sums<kPanels>() : take_up_sums<kPanels>(waiting + t * kSums);
        const auto stage = [&](int s, int begin, int end_row) {
          const int beyond = s + kAhead - end;
          const W* ask = beyond < 0  ? w.row(row) + (s + kAhead) * kStep
                         : following ? following + beyond * kStep
                                     : w.row(row);
          stage_rows(w, row, begin, end_row, s * kStep, ask, scratch + s % 2 * kColumnBytes);
        };
        stage(first, 0, kTileRows);
        for (int s = first; s < end; ++s) {
          const auto next_step = [&](int begin, int end_row) {
            if (s + 1 < end) stage(s + 1, begin, end_row);
          };
          step<kPanels, kWeightParts<W>>(scratch + s % 2 * kColumnBytes, x + s * kColumnBytes, panel,
                                         next_step);
        }
        if (end < steps) {
          keep_sums<kPanels>(waiting + t * kSums);
        } else {
          store_sums<kPanels>(tile, result + t * columns * kTileRows);
        }
      }
    }
  }

  // ---- what is not finite: a zero part times an infinity is NaN to tiles

  // Elements k .. k + 15 of a column: the sum of their parts, small ones first, for the first and the second
  // of the largest numbers add up to more than there is.
  TRANCHE_INLINE Vec values_of(const char* panel, int column, int k) {
    const __m256i rows = _mm256_setr_epi32(0, 64, 128, 192, 256, 320, 384, 448);
    const char* pairs = panel + k / kStep * kColumnBytes + k % kStep / 2 * 64 + column * 4;
    Vec sum = vset(0.0f);
    for (int p = kParts - 1; p >= 0; --p) {
      const int* from = reinterpret_cast<const int*>(pairs + p * kTileBytes);
      const __m256i part = _mm256_i32gather_epi32(from, rows, 1);
      sum = vadd(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16)));
    }
    return sum;
  }

  // Computes again, by FMAs, what is not finite of a column's sums.
  template <class W>
  static void mend(const Rows<W>& w, int first_row, const char* x, int column, float* sums) {
    constexpr int kNotFinite = 0x99;
    const Mask bad = _mm512_fpclass_ps_mask(vload(sums), kNotFinite);
    if (__builtin_expect(bad == 0, 1)) return;
    const char* panel = x + column / kPanel * panel_bytes(w.columns);
    const int rows = least(w.rows - first_row, kTileRows);
    Vec again[kTileRows];
    for (int r = 0; r < kTileRows; ++r) again[r] = vset(0.0f);
    for (int k = 0; k < w.columns; k += kWidth) {
      const Vec values = values_of(panel, column % kPanel, k);
      for (int r = 0; r < rows; ++r) {
        if (bad >> r & 1) {
          const Vec weights = load_first(w.row(first_row + r) + k, w.columns - k);
          again[r] = vfma(weights, values, again[r]);
        }
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      if (bad >> r & 1) sums[r] = _mm512_reduce_add_ps(again[r]);
    }
  }
};

}  // namespace tranche::cpu::TRANCHE_ISA
