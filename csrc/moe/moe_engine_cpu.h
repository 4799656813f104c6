// Products of 16 weight rows (kTileRows) with up to 64 columns (tokens): what all engines share, and the fp64
// engine.
//
// An engine keeps columns in panels of 16, in the layout that its product reads. Each sum is one fixed
// sequence of operations whatever the number of columns, so a column's bits do not depend on its neighbours:
//   LaneEngine  the lanes of one vector run along k; a fixed tree adds them (moe_engine_lanes_cpu.h)
//   AmxEngine   one tile accumulator along all k (moe_engine_amx_cpu.h)
//   PartsEngine likewise, of floats in three parts (moe_engine_parts_amx_cpu.h)
//   F64Engine   eight lanes of double along k
// and those of packed weights, whose lanes are the 16 rows (moe_engine_packed_cpu.h).
#pragma once

#include <cstring>

#include "bits/packed.h"
#include "core/arena.h"
#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int kPanel = 16;         // columns in a panel
constexpr int kGroupColumns = 64;  // columns in a product at most

// Rows of a matrix in memory. What lies beyond `rows` and `columns` is never read.
template <class W>
struct Rows {
  const W* data;
  int64_t stride;  // elements
  int rows, columns;

  const W* row(int64_t r) const { return data + r * stride; }
};

class F64Engine {
 public:
  using Compute = double;
  struct Session {};
  static constexpr int kTilesTogether = 1;

  static int64_t panel_bytes(int depth) {
    return int64_t(kPanel) * depth_padded(depth) * int64_t(sizeof(double));
  }
  static int64_t scratch_bytes() { return 64; }

  static void pack(const double* const (&rows)[kPanel], int depth, void* panel) {
    double* to = static_cast<double*>(panel);
    const int64_t pad = depth_padded(depth);
    for (int c = 0; c < kPanel; ++c, to += pad) {
      for (int64_t k = 0; k < pad; ++k) to[k] = rows[c] && k < depth ? rows[c][k] : 0.0;
    }
  }

  static void put(void* panel, int depth, int column, int first_row, const double* values) {
    memcpy(static_cast<double*>(panel) + column * depth_padded(depth) + first_row, values,
           kTileRows * sizeof(double));
  }

  template <class W>
  static void product(const Rows<W>& w, int first_row, const void* panels, int columns, double* result, void*,
                      const W*) {
    const int64_t pad = depth_padded(w.columns);
    for (int c = 0; c < columns; ++c) {
      const double* x = static_cast<const double*>(panels) + c * pad;
      for (int r = 0; r < kTileRows; ++r) {
        double lanes[kLanes] = {};
        if (first_row + r < w.rows) {
          const W* row = w.row(first_row + r);
          for (int k = 0; k < w.columns; ++k) lanes[k % kLanes] += double(row[k]) * x[k];
        }
        result[c * kTileRows + r] =
            ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
      }
    }
  }

 private:
  static constexpr int kLanes = 8;
  static int64_t depth_padded(int depth) { return round_up(depth, 16); }
};

}  // namespace tranche::cpu::TRANCHE_ISA
