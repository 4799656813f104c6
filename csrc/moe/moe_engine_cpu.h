// Products of 16 weight rows with up to 64 columns (tokens), for every instruction set: the FMA and fp64
// engines.
//
// An engine keeps columns in panels of 16, in the layout that its product reads. Each sum is one fixed
// sequence of operations whatever the number of columns, so a column's bits do not depend on its neighbours:
//   FmaEngine  lane k % width of one vector sums elements k, k + width, ... by FMA; a fixed tree adds the
//   lanes F64Engine  the same with 8 lanes of double AmxEngine  one tile accumulator along all k
//   (moe_engine_amx_cpu.h)
#pragma once

#include <cstring>

#include "core/arena.h"
#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int kPanel = 16;         // columns in a panel
constexpr int kTileRows = 16;      // weight rows in a product
constexpr int kGroupColumns = 64;  // columns in a product at most

// Rows of a matrix in memory. What lies beyond `rows` and `columns` is never read.
template <class W>
struct Rows {
  const W* data;
  int64_t stride;  // elements
  int rows, columns;

  const W* row(int64_t r) const { return data + r * stride; }
};

TRANCHE_INLINE void widen(const float* from, float* to, int n) {
  memcpy(to, from, size_t(n) * sizeof(float));
}
TRANCHE_INLINE void widen(const half* from, float* to, int n) { row_to_float(from, to, n); }
TRANCHE_INLINE void widen(const bf16* from, float* to, int n) { row_to_float(from, to, n); }
TRANCHE_INLINE void widen(const int8_t* from, float* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = float(from[i]);
}
template <class W>
TRANCHE_INLINE void widen(const W* from, double* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = double(from[i]);
}

// Asks for what a product will read next: `bytes` of each of 16 rows.
TRANCHE_INLINE void prefetch_rows(const char* first, int64_t stride, int64_t bytes) {
  for (int r = 0; r < kTileRows; ++r) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + r * stride + i, 0, 2);
  }
}

#if defined(__AVX512F__)
constexpr int kBlockRows = 4, kBlockColumns = 6;  // 24 accumulators of 32 registers
#else
constexpr int kBlockRows = 2, kBlockColumns = 4;  // 8 of 16
#endif

constexpr int kBlockVectors = kBlockRows * kBlockColumns;

// accumulators[c][r] += w[r] * x[c], lane by lane, for kBlockRows rows and kColumns columns.
template <int kColumns>
TRANCHE_INLINE void fma_block(const float* const* w, const float* x, int64_t x_stride, int depth, bool first,
                              float* accumulators) {
  Vec acc[kColumns][kBlockRows];
#pragma GCC unroll 6
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) {
      acc[c][r] = first ? vset(0.0f) : vload(accumulators + (c * kBlockRows + r) * kWidth);
    }
  }
  for (int k = 0; k < depth; k += kWidth) {
    Vec row[kBlockRows];
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) row[r] = vload(w[r] + k);
#pragma GCC unroll 6
    for (int c = 0; c < kColumns; ++c) {
      const Vec column = vload(x + c * x_stride + k);
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r) acc[c][r] = vfma(row[r], column, acc[c][r]);
    }
  }
#pragma GCC unroll 6
  for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) vstore(accumulators + (c * kBlockRows + r) * kWidth, acc[c][r]);
  }
}

// sums[r] = the sum of the lanes of row r's vector, for the 16 rows of one column: kBlockRows vectors in each
// block.
TRANCHE_INLINE void add_lanes(const float* vectors, float* sums) {
  constexpr int kBlock = kBlockVectors * kWidth;
#if defined(__AVX512F__)
  Vec four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* v = vectors + i * kBlock;
    const Vec a = vload(v), b = vload(v + 16), c = vload(v + 32), d = vload(v + 48);
    const __m512d ab = _mm512_castps_pd(vadd(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(vadd(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    four[i] =
        vadd(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  const Vec low =
      vadd(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  const Vec high =
      vadd(_mm512_shuffle_f32x4(four[2], four[3], 0x88), _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
  vstore(sums, vadd(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)));
#else
  for (int r = 0; r < kTileRows; ++r) {
    float lanes[kWidth];
    memcpy(lanes, vectors + r / kBlockRows * kBlock + r % kBlockRows * kWidth, sizeof lanes);
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    sums[r] = lanes[0];
  }
#endif
}

class FmaEngine {
 public:
  using Compute = float;
  struct Session {};

  // From column to column: one line more than the depth, because columns (and rows) a power of two apart
  // would share the same few sets of the L1 cache.
  static int64_t padded(int depth) { return round_up(depth, 16) + 16; }
  static int64_t panel_bytes(int depth) { return kPanel * padded(depth) * int64_t(sizeof(float)); }
  static int64_t scratch_bytes() {
    return int64_t(kAccumulators + kTileRows * kStagedStride) * int64_t(sizeof(float));
  }

  // Columns from 16 rows of memory; a null row is a column of zeros.
  template <class T>
  static void pack(const T* const (&rows)[kPanel], int depth, void* panel) {
    float* to = static_cast<float*>(panel);
    const int64_t pad = padded(depth);
    for (int c = 0; c < kPanel; ++c, to += pad) {
      const int filled = rows[c] ? depth : 0;
      if (filled) widen(rows[c], to, filled);
      for (int64_t k = filled; k < pad; ++k) to[k] = 0.0f;
    }
  }

  // Elements first_row..+15 of one column.
  static void put(void* panel, int depth, int column, int first_row, const float* values) {
    memcpy(static_cast<float*>(panel) + column * padded(depth) + first_row, values,
           kTileRows * sizeof(float));
  }

  // result[c][r] = <row first_row + r, column c>; rows beyond the matrix give 0. `next` is where the product
  // after this one will read, or null.
  template <class W>
  static void product(const Rows<W>& w, int first_row, const void* panels, int columns, float* result,
                      void* scratch, const W* next) {
    float* acc = static_cast<float*>(scratch);
    float* staged = acc + kAccumulators;
    const float* x = static_cast<const float*>(panels);
    const int64_t x_stride = padded(w.columns);
    const int rows = least(w.rows - first_row, kTileRows);
    const bool few_columns = columns <= kBlockColumns;  // then a copy of the rows would not pay
    for (int k = 0; k < w.columns; k += kChunk) {
      const int length = least(kChunk, w.columns - k);
      const float* row[kTileRows];
      stage(w, first_row, rows, k, length, few_columns, staged, row);
      if (rows == kTileRows) {
        const bool last = k + kChunk >= w.columns;
        const W* ahead = last ? next : w.row(first_row) + k + kChunk;
        const int ahead_length = least(kChunk, last ? w.columns : w.columns - k - kChunk);
        if (ahead) {
          prefetch_rows(reinterpret_cast<const char*>(ahead), w.stride * int64_t(sizeof(W)),
                        ahead_length * int64_t(sizeof(W)));
        }
      }
      const int depth = int(round_up(length, 16));
      for (int half = 0; half < kTileRows; half += kL1Rows) {
        for (int c = 0; c < columns; c += kBlockColumns) {
          for (int r = half; r < half + kL1Rows; r += kBlockRows) {
            block(least(columns - c, kBlockColumns), row + r, x + c * x_stride + k, x_stride, depth, k == 0,
                  block_of(acc, c, r));
          }
        }
      }
    }
    for (int c = 0; c < columns; ++c) {
      add_lanes(block_of(acc, c, 0) + c % kBlockColumns * kBlockRows * kWidth, result + c * kTileRows);
    }
  }

 private:
  // In L1 stay kL1Rows rows of a chunk, 16 KB, and the chunk's elements of a block of columns.
  static constexpr int kChunk = 512, kL1Rows = 8, kStagedStride = kChunk + 16;
  static constexpr int kColumnBlocks = (kGroupColumns + kBlockColumns - 1) / kBlockColumns;
  static constexpr int kAccumulators = kColumnBlocks * (kTileRows / kBlockRows) * kBlockVectors * kWidth;

  static float* block_of(float* accumulators, int column, int row) {
    const int block = column / kBlockColumns * (kTileRows / kBlockRows) + row / kBlockRows;
    return accumulators + block * kBlockVectors * kWidth;
  }

  template <class W>
  TRANCHE_INLINE void stage(const Rows<W>& w, int first_row, int rows, int k, int length, bool in_place,
                            float* staged, const float** row) {
    if constexpr (__is_same(W, float)) {
      if (in_place && rows == kTileRows && length % 16 == 0) {
        for (int r = 0; r < kTileRows; ++r) row[r] = w.row(first_row + r) + k;
        return;
      }
    }
    const int depth = int(round_up(length, 16));
    for (int r = 0; r < kTileRows; ++r) {
      float* to = staged + r * kStagedStride;
      const int filled = r < rows ? length : 0;
      if (filled) widen(w.row(first_row + r) + k, to, filled);
      for (int i = filled; i < depth; ++i) to[i] = 0.0f;
      row[r] = to;
    }
  }

  TRANCHE_INLINE void block(int columns, const float* const* w, const float* x, int64_t x_stride, int depth,
                            bool first, float* acc) {
    switch (columns) {
      case 1:
        return fma_block<1>(w, x, x_stride, depth, first, acc);
      case 2:
        return fma_block<2>(w, x, x_stride, depth, first, acc);
      case 3:
        return fma_block<3>(w, x, x_stride, depth, first, acc);
      case 4:
        return fma_block<4>(w, x, x_stride, depth, first, acc);
#if defined(__AVX512F__)
      case 5:
        return fma_block<5>(w, x, x_stride, depth, first, acc);
      case 6:
        return fma_block<6>(w, x, x_stride, depth, first, acc);
#endif
    }
  }
};

class F64Engine {
 public:
  using Compute = double;
  struct Session {};

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
