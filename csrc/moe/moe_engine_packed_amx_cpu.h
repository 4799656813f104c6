// The AMX engine of packed experts, for bf16 columns. A decoded tile of 16 rows x 32 inputs is the second
// operand of `tdpbf16ps` as it comes, and columns are the first, with their inputs in the order that decoding
// gives: [depth / 32][16 columns][32 inputs].
#pragma once

#include "moe/moe_engine_packed_cpu.h"
#include "moe/moe_sums_amx_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

class PackedAmxEngine {
 public:
  using Compute = float;
  using Session = Tiles;
  static constexpr int kTilesTogether = 1;

  static int64_t panel_bytes(int depth) { return kPanel * round_up(depth, kTileInputs) * 2; }
  static int64_t scratch_bytes() { return kRing * kTileBytes; }

  static void pack(const bf16* const (&rows)[kPanel], int depth, void* panel) {
    char* to = static_cast<char*>(panel);
    for (int k = 0; k < depth; k += kTileInputs) {
      for (int c = 0; c < kPanel; ++c, to += 64) {
        if (rows[c]) {
          PackedDotLanes::pack(rows[c] + k, reinterpret_cast<uint16_t*>(to), least(depth - k, kTileInputs));
        } else {
          _mm512_storeu_si512(to, _mm512_setzero_si512());
        }
      }
    }
  }

  static void put(void* panel, int, int column, int first_row, const float* values) {
    uint16_t* tile = static_cast<uint16_t*>(panel) + first_row / kTileInputs * (kTileBytes / 2);
    PackedDotLanes::put(values, tile + column * kTileInputs + first_row % kTileInputs);
  }

  static void product(const Rows<Packed>& rows, int first_row, const void* panels, int columns, float* result,
                      void* scratch, const Packed*) {
    const char* x = static_cast<const char*>(panels);
    char* staged = static_cast<char*>(scratch);
    with_guarded_reading(rows.w, [&](auto reading) {
      using R = decltype(reading);
      with_panels(columns, [&](auto count) {
        product_of<decltype(count)::value, R>(rows.w, first_row, x, result, staged);
      });
    });
  }

 private:
  // A tile is multiplied when kLag later ones are decoded: it has then left the store buffer, and products,
  // each of which waits for the one before, run beside decoding.
  static constexpr int64_t kLag = 4, kRing = 8;

  // Tiles 0..3 are the accumulators of the panels, 4 weights, 6 and 7 columns.
  template <int kPanels>
  TRANCHE_INLINE void step(const char* w, const char* x, int64_t panel) {
    tile_load<4>(w, 64);
    tile_load<6>(x, 64);
    tile_dot_bf16<0, 6, 4>();
    if constexpr (kPanels > 1) {
      tile_load<7>(x + panel, 64);
      tile_dot_bf16<1, 7, 4>();
    }
    if constexpr (kPanels > 2) {
      tile_load<6>(x + 2 * panel, 64);
      tile_dot_bf16<2, 6, 4>();
    }
    if constexpr (kPanels > 3) {
      tile_load<7>(x + 3 * panel, 64);
      tile_dot_bf16<3, 7, 4>();
    }
  }

  template <int kPanels, class R>
  static void product_of(const PackedWeight& w, int first_row, const char* x, float* result, char* staged) {
    const Streams from = streams_of(w, first_row / kTileRows * w.input_tiles);
    const Rounding rounding = rounding_of_bits(w.bits);
    const int64_t panel = panel_bytes(int(w.in_features));
    clear_sums<kPanels>();
    for (int64_t t = 0; t < w.input_tiles + kLag; ++t) {
      if (t < w.input_tiles) {
        prefetch_tile<R>(from, t + kPackedAhead);
        char* to = staged + t % kRing * kTileBytes;
        decode_weights<PackedDotLanes, R>(from, t, rounding,
                                          [to](int v, int, Bytes weights) { bstore(to + 64 * v, weights); });
      }
      if (t >= kLag)
        step<kPanels>(staged + (t - kLag) % kRing * kTileBytes, x + (t - kLag) * kTileBytes, panel);
    }
    // an accumulator is [column][row], as the result is
    keep_sums<kPanels>(result);
  }
};

}  // namespace tranche::cpu::TRANCHE_ISA
