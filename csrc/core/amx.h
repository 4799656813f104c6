// AMX tiles for CPU kernels: eight registers of 16 rows of 64 bytes. Include from amx translation units only.
//
// The compiler's own intrinsics let ordinary stores move across a tile load; these do not. `stride` is in
// bytes.
#pragma once

#include <cstdint>

#ifndef __AMX_BF16__
#error "amx.h needs -mamx-tile -mamx-bf16"
#endif

namespace tranche::cpu::TRANCHE_ISA {

constexpr int kTileBytes = 1024;

#define TRANCHE_TILE static inline __attribute__((always_inline)) void

template <int tile>
TRANCHE_TILE tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
TRANCHE_TILE tile_load(const void* base, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
TRANCHE_TILE tile_store(void* base, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride), "i"(tile) : "memory");
}
// c[m][n] += sum over the 16 pairs k of a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1]. In hardware the even and
// the odd products are each one sequential chain of FMAs that starts at 0; c gets the sum of the two chains.
template <int c, int a, int b>
TRANCHE_TILE tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
// c[m][n] += sum over the 16 groups of four k of a[m][4k+j] b[k][4n+j], a signed and b unsigned bytes, mod
// 2^32.
template <int c, int a, int b>
TRANCHE_TILE tile_dot_s8u8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#undef TRANCHE_TILE

struct TileShape {
  int64_t rows = 16, row_bytes = 64;
};

// Gives the calling thread eight tiles for as long as it lives, full ones unless shapes are given.
class Tiles {
 public:
  explicit Tiles(const TileShape (&shapes)[8] = {{}, {}, {}, {}, {}, {}, {}, {}}) {
    alignas(64) Config config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = uint16_t(shapes[t].row_bytes);
      config.rows[t] = uint8_t(shapes[t].rows);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease" ::); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);
};

}  // namespace tranche::cpu::TRANCHE_ISA
