// The AMX engine of the experts on the CPU, for bf16 columns. Weight rows are the M side, so they are read as
// they lie; columns are kept as pairs of k, [depth / 32][16 pairs][16 columns].
#pragma once

#include "moe/moe_sums_amx_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

class AmxEngine {
 public:
  using Compute = float;
  using Session = Tiles;
  static constexpr int kTilesTogether = 1;

  static int64_t padded(int depth) { return round_up(depth, kStep); }
  static int64_t panel_bytes(int depth) { return kPanel * padded(depth) * 2; }
  static int64_t scratch_bytes() { return kTileRows * kStaged * 2 + kTileBytes; }

  static void pack(const bf16* const (&rows)[kPanel], int depth, void* panel) {
    char* to = static_cast<char*>(panel);
    for (int k = 0; k < depth; k += kStep, to += kTileBytes) {
      const int left = least(depth - k, kStep);
      const __mmask32 mask = left == kStep ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
      __m512i block[16];
#pragma GCC unroll 16
      for (int c = 0; c < kPanel; ++c) {
        block[c] = rows[c] ? _mm512_maskz_loadu_epi16(mask, rows[c] + k) : _mm512_setzero_si512();
      }
      transpose16(block);
#pragma GCC unroll 16
      for (int pair = 0; pair < 16; ++pair) _mm512_storeu_si512(to + pair * 64, block[pair]);
    }
  }

  static void put(void* panel, int, int column, int first_row, const float* values) {
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(vload(values)));
    uint32_t pairs[8];
    memcpy(pairs, &rounded, sizeof pairs);
    uint32_t* to = static_cast<uint32_t*>(panel) + first_row / 2 * kPanel + column;
    for (int i = 0; i < 8; ++i) to[i * kPanel] = pairs[i];
  }

  template <class W>
  static void product(const Rows<W>& w, int first_row, const void* panels, int columns, float* result,
                      void* scratch, const W* next) {
    with_panels(columns, [&](auto count) {
      product_of<decltype(count)::value>(w, first_row, panels, result, scratch, next);
    });
  }

 private:
  static constexpr int kStep = 32;     // k of one tile
  static constexpr int kStaged = 512;  // k staged at a time
  static constexpr int kAhead = 16;

  // Tiles 0..3 are the accumulators of the panels, 4 weights, 6 and 7 columns.
  template <int kPanels>
  TRANCHE_INLINE void step(const char* a, int64_t stride, const char* b, int64_t panel) {
    tile_load<4>(a, stride);
    tile_load<6>(b, 64);
    tile_dot_bf16<0, 4, 6>();
    if constexpr (kPanels > 1) {
      tile_load<7>(b + panel, 64);
      tile_dot_bf16<1, 4, 7>();
    }
    if constexpr (kPanels > 2) {
      tile_load<6>(b + 2 * panel, 64);
      tile_dot_bf16<2, 4, 6>();
    }
    if constexpr (kPanels > 3) {
      tile_load<7>(b + 3 * panel, 64);
      tile_dot_bf16<3, 4, 7>();
    }
  }

  // With kFetch each row is asked for kAhead steps before its use, and at its end the beginning of the `next`
  // one.
  template <int kPanels, bool kFetch>
  static void steps(const char* a, int64_t stride, const char* b, int64_t panel, int count,
                    const char* next) {
    for (int i = 0; i < count; ++i, a += 64, b += kTileBytes) {
      if constexpr (kFetch) {
        const int beyond = i + kAhead - count;
        const char* ask = beyond < 0 ? a + kAhead * 64 : next ? next + beyond * 64 : a;
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) __builtin_prefetch(ask + r * stride, 0, 2);
      }
      step<kPanels>(a, stride, b, panel);
    }
  }

  static void stage(const bf16* from, int n, uint16_t* to) { memcpy(to, from, size_t(n) * 2); }
  static void stage(const int8_t* from, int n, uint16_t* to) {
    for (int i = 0; i < n; i += 16) {
      const __mmask16 mask = n - i >= 16 ? __mmask16(~0) : __mmask16((1u << (n - i)) - 1u);
      const __m512i wide = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, from + i));
      // exact: 8 bits of significand hold every int8
      const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_cvtepi32_ps(wide)));
      _mm256_mask_storeu_epi16(to + i, mask, rounded);
    }
  }

  template <int kPanels, class W>
  static void product_of(const Rows<W>& w, int first_row, const void* panels, float* result, void* scratch,
                         const W* next) {
    const char* b = static_cast<const char*>(panels);
    const int64_t panel = panel_bytes(w.columns), stride = w.stride * int64_t(sizeof(W));
    const int rows = least(w.rows - first_row, kTileRows);
    uint16_t* staged = static_cast<uint16_t*>(scratch);
    clear_sums<kPanels>();
    int k = 0;
    if constexpr (__is_same(W, bf16)) {
      if (rows == kTileRows) {
        const int whole = w.columns / kStep;
        steps<kPanels, true>(reinterpret_cast<const char*>(w.row(first_row)), stride, b, panel, whole,
                             reinterpret_cast<const char*>(next));
        k = whole * kStep;
      }
    }
    for (; k < w.columns; k += kStaged) {
      const int length = least(w.columns - k, kStaged), depth = int(padded(length));
      for (int r = 0; r < kTileRows; ++r) {
        uint16_t* to = staged + r * kStaged;
        const int filled = r < rows ? length : 0;
        if (filled) {
          stage(w.row(first_row + r) + k, filled, to);
          __builtin_prefetch(w.row(first_row + r) + least(k + kStaged, w.columns - 1));
        }
        memset(to + filled, 0, size_t(depth - filled) * 2);
      }
      steps<kPanels, false>(reinterpret_cast<const char*>(staged), kStaged * 2,
                            b + int64_t(k / kStep) * kTileBytes, panel, depth / kStep, nullptr);
    }
    float* tile = reinterpret_cast<float*>(staged + kTileRows * kStaged);
    store_sums<kPanels>(tile, result);
  }
};

}  // namespace tranche::cpu::TRANCHE_ISA
