// AMX tiles for CPU kernels: eight registers of 16 rows of 64 bytes. Include from amx translation units only.
//
// The compiler's own intrinsics let ordinary stores move across a tile load; these do not. Tile numbers are
// literals. `stride` is in bytes.
#pragma once

#include <cstdint>

#ifndef __AMX_BF16__
#error "amx.h needs -mamx-tile -mamx-bf16"
#endif

#define TRANCHE_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t::)
#define TRANCHE_TILE_LOAD(t, base, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(base), "r"(int64_t(stride)) : "memory")
#define TRANCHE_TILE_STORE(t, base, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(base), "r"(int64_t(stride)) : "memory")
// c[m][n] += sum over the 16 pairs k of a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1]. In hardware the even and
// the odd products are each one sequential chain of FMAs that starts at 0; c gets the sum of the two chains.
#define TRANCHE_TILE_DOT_BF16(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)
// c[m][n] += sum over the 16 groups of four k of a[m][4k+j] b[k][4n+j], a signed and b unsigned bytes, mod
// 2^32.
#define TRANCHE_TILE_DOT_S8U8(c, a, b) asm volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

namespace tranche::cpu::TRANCHE_ISA {

constexpr int kTileBytes = 1024;

// The same with the tiles' numbers as template arguments, for loops that are unrolled while they are
// compiled.
template <int tile>
static inline __attribute__((always_inline)) void tile_load(const void* base, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
static inline __attribute__((always_inline)) void tile_store(void* base, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride), "i"(tile) : "memory");
}
template <int c, int a, int b>
static inline __attribute__((always_inline)) void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// Gives the calling thread eight tiles for as long as it lives: full ones, or such that 4 and 5 have rows of
// `depth` pairs and 6 and 7 have `depth` rows.
class Tiles {
 public:
  explicit Tiles(int depth = 16) {
    alignas(64) Config config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = uint16_t(t == 4 || t == 5 ? depth * 4 : 64);
      config.rows[t] = uint8_t(t >= 6 ? depth : 16);
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
