// The sums of up to four panels of columns, which are tiles 0..3.
#pragma once

#include "core/amx.h"
#include "core/constant.h"
#include "moe/moe_engine_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

// f(Constant<n>()) with the number of panels that `columns` fill, 1..4.
template <class F>
TRANCHE_INLINE void with_panels(int columns, const F& f) {
  switch ((columns + kPanel - 1) / kPanel) {
    case 1:
      return f(Constant<1>());
    case 2:
      return f(Constant<2>());
    case 3:
      return f(Constant<3>());
    case 4:
      return f(Constant<4>());
  }
}

template <int kPanels>
TRANCHE_INLINE void clear_sums() {
  tile_zero<0>();
  if constexpr (kPanels > 1) tile_zero<1>();
  if constexpr (kPanels > 2) tile_zero<2>();
  if constexpr (kPanels > 3) tile_zero<3>();
}

// A tile of sums is [row][column]; the result [column][row]. `tile` is scratch, kTileBytes of it.
template <int kTile>
TRANCHE_INLINE void store_sum(float* tile, float* result) {
  tile_store<kTile>(tile, 64);
  __m512i block[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) block[i] = _mm512_loadu_si512(tile + i * 16);
  transpose16(block);
  float* to = result + kTile * kPanel * kTileRows;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 16, block[i]);
}

template <int kPanels>
TRANCHE_INLINE void store_sums(float* tile, float* result) {
  store_sum<0>(tile, result);
  if constexpr (kPanels > 1) store_sum<1>(tile, result);
  if constexpr (kPanels > 2) store_sum<2>(tile, result);
  if constexpr (kPanels > 3) store_sum<3>(tile, result);
}

// As they are, [row][column], panel after panel.
template <int kPanels>
TRANCHE_INLINE void keep_sums(float* to) {
  tile_store<0>(to, 64);
  if constexpr (kPanels > 1) tile_store<1>(to + 256, 64);
  if constexpr (kPanels > 2) tile_store<2>(to + 512, 64);
  if constexpr (kPanels > 3) tile_store<3>(to + 768, 64);
}
template <int kPanels>
TRANCHE_INLINE void take_up_sums(const float* from) {
  tile_load<0>(from, 64);
  if constexpr (kPanels > 1) tile_load<1>(from + 256, 64);
  if constexpr (kPanels > 2) tile_load<2>(from + 512, 64);
  if constexpr (kPanels > 3) tile_load<3>(from + 768, 64);
}

}  // namespace tranche::cpu::TRANCHE_ISA
