// out[p][n] = start[n] + sum over k of x[p * step + offset[k]] * w[k][n]: the one loop nest behind the
// family's convolutions and 1x1 layers. Vector lanes are output channels; k ascends in one chain per output,
// so that a result depends on nothing but its own inputs, whatever block it was computed in.
#pragma once

#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

template <class A>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int width = kWidth;
  using V = Vec;
  TRANCHE_INLINE V load(const float* p) { return vload(p); }
  TRANCHE_INLINE void store(float* p, V x) { vstore(p, x); }
  TRANCHE_INLINE V fma(float x, V w, V sum) { return vfma(vset(x), w, sum); }
  TRANCHE_INLINE V fma(V x, V w, V sum) { return vfma(x, w, sum); }
};

template <>
struct Lanes<double> {
  static constexpr int width = kWidth / 2;
  typedef double V __attribute__((vector_size(8 * (kWidth / 2))));
  TRANCHE_INLINE V load(const double* p) {
    V x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  TRANCHE_INLINE void store(double* p, V x) { __builtin_memcpy(p, &x, sizeof x); }
  TRANCHE_INLINE V fma(double x, V w, V sum) { return x * w + sum; }
  TRANCHE_INLINE V fma(V x, V w, V sum) { return x * w + sum; }
};

// Columns are padded to whole vectors of the wider of the two types, in weights and in results.
constexpr int64_t kColumnPad = 16;
TRANCHE_INLINE int64_t padded(int64_t n) { return (n + kColumnPad - 1) / kColumnPad * kColumnPad; }

template <class A>
struct Product {
  const A* x;
  int64_t step;           // elements between the rows of x
  const int64_t* offset;  // [k] elements
  int64_t k;
  const A* w;      // [k][ldw]
  const A* start;  // [ldw]
  A* out;          // [rows][ldo]
  int64_t ldw, ldo;
};

template <class A, int kRows, int kVectors>
TRANCHE_INLINE void product_block(const Product<A>& a, int64_t row, int64_t column) {
  using L = Lanes<A>;
  typename L::V sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const typename L::V first = L::load(a.start + column + v * L::width);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) sum[r][v] = first;
  }
  const A* x = a.x + row * a.step;
  const A* w = a.w + column;
  const int64_t step = a.step;
  for (int64_t k = 0; k < a.k; ++k, w += a.ldw) {
    typename L::V weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weight[v] = L::load(w + v * L::width);
    const A* at = x + a.offset[k];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = L::fma(at[r * step], weight[v], sum[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      L::store(a.out + (row + r) * a.ldo + column + v * L::width, sum[r][v]);
    }
  }
}

template <class A, int kVectors>
TRANCHE_INLINE void product_rows(const Product<A>& a, int64_t rows, int64_t column) {
  // 12 x 2 sums and two weights fill 32 registers, 5 x 2 fill 16.
  constexpr int kMost = kWidth == 16 ? 12 : 5;
  int64_t row = 0;
  for (; row + kMost <= rows; row += kMost) product_block<A, kMost, kVectors>(a, row, column);
  for (; row + 4 <= rows; row += 4) product_block<A, 4, kVectors>(a, row, column);
  for (; row < rows; ++row) product_block<A, 1, kVectors>(a, row, column);
}

template <class A>
static void product(const Product<A>& a, int64_t rows, int64_t columns) {
  constexpr int64_t width = Lanes<A>::width;
  int64_t column = 0;
  for (; column + width < columns; column += 2 * width) product_rows<A, 2>(a, rows, column);
  if (column < columns) product_rows<A, 1>(a, rows, column);
}

// ---- weights [n][k] to [k][ldw], zero beyond n
// -------------------------------------------------------------------

template <class T, class A>
TRANCHE_INLINE A widen(T x) {
  if constexpr (sizeof(A) == 8) {
    return x;
  } else {
    return to_float(x);
  }
}

// Columns [first, first + kColumnPad) of the packed weights.
template <class T, class A>
static void pack_columns(const T* weight, int64_t n, int64_t k, int64_t first, A* packed, int64_t ldw) {
  const int64_t live = n - first < kColumnPad ? n - first : kColumnPad;
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    for (; i < k; i += 16) {
      const int count = int(k - i < 16 ? k - i : 16);
      __m512i rows[16];
      for (int r = 0; r < 16; ++r) {
        rows[r] = r < live ? _mm512_castps_si512(load16(weight + (first + r) * k + i, count))
                           : _mm512_setzero_si512();
      }
      transpose16(rows);
      for (int r = 0; r < count; ++r) _mm512_storeu_si512(packed + (i + r) * ldw + first, rows[r]);
    }
    return;
  }
#endif
  for (; i < k; ++i) {
    A* row = packed + i * ldw + first;
    for (int64_t o = 0; o < kColumnPad; ++o)
      row[o] = o < live ? widen<T, A>(weight[(first + o) * k + i]) : A(0);
  }
}

template <class T, class A>
static void pack_bias(const T* bias, int64_t n, A* packed) {
  for (int64_t o = 0; o < padded(n); ++o) packed[o] = bias && o < n ? widen<T, A>(bias[o]) : A(0);
}

// ---- rows between element types
// ----------------------------------------------------------------------------------

template <class T, class A>
TRANCHE_INLINE void load_row(const T* from, A* to, int64_t n) {
  if constexpr (sizeof(A) == 8) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  } else {
    row_to_float(from, to, int(n));
  }
}

template <class T, class A>
TRANCHE_INLINE void store_row(const A* from, T* to, int64_t n) {
  if constexpr (sizeof(A) == 8) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  } else {
#if defined(__AVX512F__)
    for (int64_t i = 0; i < n; i += 16) {
      const int left = int(n - i < 16 ? n - i : 16);
      store16(to + i, vload(from + i), left);  // rows are padded: reading 16 is safe
    }
#else
    for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(from[i]);
#endif
  }
}

template <class T, class A>
TRANCHE_INLINE T narrow(A x) {
  if constexpr (sizeof(A) == 8) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA
