// The loop nest of outer_cpu.h on AMX tiles, for bf16: a tile holds 16 outputs by one vector. The entries of
// d come in runs, equally spaced in x, and a run is cut into tiles of `piece` pairs of pixels, the last of
// `rest`.
#pragma once

#include "core/amx.h"
#include "pconv/outer_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

// As Outer<B16>, but y is [rows, rounded up to 16][y_step].
struct TileRuns {
  int64_t run, piece, rest;  // entries of d; rest in [1, piece]
  int64_t step;              // units of x between the entries of a run

  TileRuns(int64_t run_, int64_t step_) : run(run_), step(step_) {
    const int64_t pieces = (run + 15) / 16;
    piece = (run + pieces - 1) / pieces;
    rest = run - (run - 1) / piece * piece;
  }
};

// Tiles 0..3: sums. 4: outputs by pairs of pixels, 5: pairs of pixels by lanes; 6 and 7 the same for the
// rest.
TRANCHE_INLINE Tiles tiles_of_runs(const TileRuns& runs) {
  return Tiles(
      {{}, {}, {}, {}, {16, 4 * runs.piece}, {runs.piece, 64}, {16, 4 * runs.rest}, {runs.rest, 64}});
}

// 32 outputs by two vectors, or 16 by four, of which kVectors are there: tile kY takes outputs, kX vectors,
// the second 16 outputs `below` the first.
template <int kY, int kX, bool kTall, int kVectors>
TRANCHE_INLINE void outer_dots(const uint32_t* y, int64_t below, int64_t y_bytes,
                               const uint32_t* const (&x)[kVectors], int64_t at, int64_t x_bytes) {
  tile_load<kY>(y, y_bytes);
  tile_load<kX>(x[0] + at, x_bytes);
  tile_dot_bf16<0, kY, kX>();
  if constexpr (kVectors > 1) {
    tile_load<kX>(x[1] + at, x_bytes);
    tile_dot_bf16<1, kY, kX>();
  }
  if constexpr (kTall) {
    tile_load<kY>(y + below, y_bytes);
    if constexpr (kVectors > 1) {
      tile_dot_bf16<3, kY, kX>();
      tile_load<kX>(x[0] + at, x_bytes);
    }
    tile_dot_bf16<2, kY, kX>();
  } else {
    if constexpr (kVectors > 2) {
      tile_load<kX>(x[2] + at, x_bytes);
      tile_dot_bf16<2, kY, kX>();
    }
    if constexpr (kVectors > 3) {
      tile_load<kX>(x[3] + at, x_bytes);
      tile_dot_bf16<3, kY, kX>();
    }
  }
}

template <bool kTall, int kVectors>
static void tile_block(const Outer<B16>& a, const TileRuns& runs, int64_t row, int64_t vector) {
  constexpr int kFetches = 8;
  const int64_t x_bytes = runs.step * 4, y_bytes = a.y_step * 4;
  const uint32_t *x[kVectors], *y = a.y + row * a.y_step;
  for (int v = 0; v < kVectors; ++v) x[v] = a.x + a.vector[vector + v];
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  Lines ahead = *a.ahead;
  for (int64_t d = 0; d < a.depth; d += runs.run) {
    int64_t at = a.offset[d];
    for (int64_t i = runs.piece; i < runs.run; i += runs.piece) {
      for (int f = 0; f < kFetches; ++f) ahead.fetch();
      outer_dots<4, 5, kTall>(y, 16 * a.y_step, y_bytes, x, at, x_bytes);
      at += runs.piece * runs.step;
      y += runs.piece;
    }
    for (int f = 0; f < kFetches; ++f) ahead.fetch();
    outer_dots<6, 7, kTall>(y, 16 * a.y_step, y_bytes, x, at, x_bytes);
    y += runs.rest;
  }
  *a.ahead = ahead;
  alignas(64) float sums[4][16 * 16];
  tile_store<0>(sums[0], 64);
  tile_store<1>(sums[1], 64);
  tile_store<2>(sums[2], 64);
  tile_store<3>(sums[3], 64);
  for (int t = 0; t < (kTall ? 2 : 1) * kVectors; ++t) {
    const int64_t first = row + (kTall ? t / kVectors * 16 : 0), live = least<int64_t>(16, a.rows - first);
    const float* tile = sums[kTall ? t / kVectors * 2 + t % kVectors : t];
    for (int64_t r = 0; r < live; ++r) {
      put_sum(a, a.begins, (first + r) * a.vectors + vector + t % kVectors, vload(tile + r * 16));
    }
  }
}

template <bool kTall>
static void tile_row(const Outer<B16>& a, const TileRuns& runs, int64_t row, int64_t vector,
                     int64_t vectors) {
  if constexpr (!kTall) {
    if (vectors == 4) return tile_block<kTall, 4>(a, runs, row, vector);
    if (vectors == 3) return tile_block<kTall, 3>(a, runs, row, vector);
  }
  vectors == 2 ? tile_block<kTall, 2>(a, runs, row, vector) : tile_block<kTall, 1>(a, runs, row, vector);
}

static void tile_outer(const Outer<B16>& a, const TileRuns& runs) {
  const Tiles tiles = tiles_of_runs(runs);
  const int64_t together = a.rows > 16 ? 2 : 4;
  for (int64_t vector = 0; vector < a.vectors; vector += together) {
    const int64_t vectors = least(together, a.vectors - vector);
    for (int64_t row = 0; row < a.rows; row += 32) {
      a.rows - row > 16 ? tile_row<true>(a, runs, row, vector, vectors)
                        : tile_row<false>(a, runs, row, vector, vectors);
    }
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA
