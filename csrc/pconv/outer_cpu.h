// sums[row][vector][lane] += sum over d of y[d][row] * x[offset[d] + vector + lane]: the loop nest behind the
// gradient of a convolution's weight. d are pixels (pairs of them in bf16), rows are outputs, vectors hold
// neighbouring (tap, channel).
//
// A sum is a chain of FMAs over at most kPiece entries of d, and pieces are added in their order, whatever
// block of rows and vectors it was computed in.
#pragma once

#include "pconv/product_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

// Lines of memory that the next product will need, asked for while this one computes.
struct Lines {
  const char *const *next = nullptr, *const *end = nullptr;
  void fetch() {
    if (next < end) __builtin_prefetch(*next++, 0, 2);
  }
};

template <class K>
struct Outer {
  const typename K::Unit* x;
  const int64_t* offset;      // [depth] units of x
  const int64_t* vector;      // [vectors] units: where each vector begins, from a pixel's offset on
  const typename K::Unit* y;  // [depth][y_step]
  int64_t y_step, depth, rows, vectors;
  typename K::A* sums;  // [rows][vectors][kLanes]
  bool begins;          // sums hold nothing yet
  Lines* ahead;
};

constexpr int64_t kPiece = 160;  // entries of d whose x and y stay in the first-level cache for all rows

template <class K>
TRANCHE_INLINE void put_sum(const Outer<K>& a, bool begins, int64_t at, typename K::V sum) {
  typename K::A* to = a.sums + at * K::kLanes;
  K::store(to, begins ? sum : K::load(to) + sum);
}

template <class K, int kRows, int kVectors>
static void outer_block(const Outer<K>& a, int64_t begin, int64_t end, int64_t row, int64_t vector) {
  typename K::V sum[kRows][kVectors] = {};
  const typename K::Unit *x[kVectors], *y = a.y + begin * a.y_step + row;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) x[v] = a.x + a.vector[vector + v];
  Lines ahead = *a.ahead;
  for (int64_t d = begin; d < end; ++d, y += a.y_step) {
    if (d % 4 == 0) ahead.fetch();
    const int64_t at = a.offset[d];
    decltype(K::weights(x[0])) lanes[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) lanes[v] = K::weights(x[v] + at);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = K::fma(y[r], lanes[v], sum[r][v]);
    }
  }
  *a.ahead = ahead;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      put_sum(a, a.begins && begin == 0, (row + r) * a.vectors + vector + v, sum[r][v]);
    }
  }
}

template <class K, int kVectors>
static void outer_rows(const Outer<K>& a, int64_t begin, int64_t end, int64_t vector) {
  // Sums, lanes and one value of y fill 32 registers on AVX-512, 16 elsewhere.
  constexpr int kMost = kWidth == 16 ? 8 : 4;
  int64_t row = 0;
  for (; row + kMost <= a.rows; row += kMost) outer_block<K, kMost, kVectors>(a, begin, end, row, vector);
  if constexpr (kMost == 8) {
    if (row + 4 <= a.rows) outer_block<K, 4, kVectors>(a, begin, end, row, vector), row += 4;
  }
  if (row + 2 <= a.rows) outer_block<K, 2, kVectors>(a, begin, end, row, vector), row += 2;
  if (row < a.rows) outer_block<K, 1, kVectors>(a, begin, end, row, vector);
}

template <class K>
static void outer(const Outer<K>& a) {
  for (int64_t vector = 0; vector < a.vectors; vector += 3) {
    for (int64_t begin = 0; begin < a.depth; begin += kPiece) {
      const int64_t end = least(a.depth, begin + kPiece), left = a.vectors - vector;
      if (left >= 3) outer_rows<K, 3>(a, begin, end, vector);
      if (left == 2) outer_rows<K, 2>(a, begin, end, vector);
      if (left == 1) outer_rows<K, 1>(a, begin, end, vector);
    }
  }
}

// A channel each, lanes are channels: sums[tap][lane] += sum over d of y[d][lane] * x[offset[d] + tap +
// lane], taps being a.vectors and lanes a.rows in number, sums [taps][y_step].
template <class K, int kTaps>
static void depthwise_block(const Outer<K>& a, int64_t begin, int64_t end, int64_t tap, int64_t lane) {
  typename K::V sum[kTaps] = {};
  const typename K::Unit *x[kTaps], *y = a.y + begin * a.y_step + lane;
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t) x[t] = a.x + a.vector[tap + t] + lane;
  for (int64_t d = begin; d < end; ++d, y += a.y_step) {
    const typename K::V gradient = K::load(y);
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) sum[t] = K::lanes(K::load(x[t] + a.offset[d]), gradient, sum[t]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t) {
    put_sum(a, a.begins && begin == 0, ((tap + t) * a.y_step + lane) / K::kLanes, sum[t]);
  }
}

template <class K>
static void depthwise_outer(const Outer<K>& a) {
  for (int64_t begin = 0; begin < a.depth; begin += kPiece) {
    const int64_t end = least(a.depth, begin + kPiece);
    for (int64_t lane = 0; lane < a.rows; lane += K::kLanes) {
      int64_t tap = 0;
      for (; tap + 8 <= a.vectors; tap += 8) depthwise_block<K, 8>(a, begin, end, tap, lane);
      for (; tap + 3 <= a.vectors; tap += 3) depthwise_block<K, 3>(a, begin, end, tap, lane);
      for (; tap < a.vectors; ++tap) depthwise_block<K, 1>(a, begin, end, tap, lane);
    }
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA
