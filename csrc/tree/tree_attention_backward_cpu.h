// Arithmetic of tree_attention's backward pass on the CPU: small matrix products, and what happens to a row
// of scores. Everything exists for float (which also serves half and bf16) and for double.
#pragma once

#include "core/numeric.h"
#include "core/simd.h"
#include "tree/tree_attention.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int kTile = 64;   // slots, and rows, of a tile of scores
constexpr int kChain = 16;  // products that are summed in a row
constexpr float kLog2e = 1.4426950408889634f;

template <class A>
struct Simd;

template <>
struct Simd<float> {
  using V = Vec;
  static constexpr int kLanes = kWidth;
  TRANCHE_INLINE V set(float x) { return vset(x); }
  TRANCHE_INLINE V load(const float* p) { return vload(p); }
  TRANCHE_INLINE void store(float* p, V x) { vstore(p, x); }
  TRANCHE_INLINE V add(V x, V y) { return vadd(x, y); }
  TRANCHE_INLINE V fma(V x, V y, V z) { return vfma(x, y, z); }
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kWidth * sizeof(float))));
  static constexpr int kLanes = kWidth / 2;
  TRANCHE_INLINE V set(double x) { return V{} + x; }
  TRANCHE_INLINE V load(const double* p) {
    V x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  TRANCHE_INLINE void store(double* p, V x) { __builtin_memcpy(p, &x, sizeof x); }
  TRANCHE_INLINE V add(V x, V y) { return x + y; }
  TRANCHE_INLINE V fma(V x, V y, V z) { return x * y + z; }
};

// A left operand: element (m, k) is at m * row + k * column.
template <class A>
struct Left {
  const A* data;
  int row, column;
};

template <class A, int kRows, int kVectors>
TRANCHE_INLINE void multiply_tile(A* c, int ldc, const Left<A>& a, const A* b, int ldb, int depth) {
  using S = Simd<A>;
  typename S::V sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[i][j] = S::set(0);
  }
  for (int k = 0; k < depth; ++k) {
    typename S::V right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = S::load(b + int64_t(k) * ldb + j * S::kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const typename S::V left = S::set(a.data[int64_t(i) * a.row + int64_t(k) * a.column]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = S::fma(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      A* to = c + i * ldc + j * S::kLanes;
      S::store(to, S::add(S::load(to), sum[i][j]));
    }
  }
}

template <class A, int kVectors>
TRANCHE_INLINE void multiply_columns(A* c, int ldc, const Left<A>& a, const A* b, int ldb, int rows,
                                     int depth) {
  int m = 0;
  for (; m + 4 <= rows; m += 4) {
    multiply_tile<A, 4, kVectors>(c + int64_t(m) * ldc, ldc, {a.data + int64_t(m) * a.row, a.row, a.column},
                                  b, ldb, depth);
  }
  for (; m < rows; ++m) {
    multiply_tile<A, 1, kVectors>(c + int64_t(m) * ldc, ldc, {a.data + int64_t(m) * a.row, a.row, a.column},
                                  b, ldb, depth);
  }
}

// c [rows, columns] += a [rows, depth] b [depth, columns]; columns is a multiple of 16. At most kChain
// products are summed in a row before the sum joins c: longer chains of roundings show in fp32.
template <class A>
static void multiply(A* c, int ldc, const Left<A>& a, const A* b, int ldb, int rows, int columns, int depth) {
  constexpr int kVectors = kWidth == 16 ? 4 : 2;  // with 4 rows: half the registers there are
  constexpr int kStep = kVectors * Simd<A>::kLanes;
  for (int k = 0; k < depth; k += kChain) {
    const int left = depth - k < kChain ? depth - k : kChain;
    const Left<A> part = {a.data + int64_t(k) * a.column, a.row, a.column};
    const A* right = b + int64_t(k) * ldb;
    int n = 0;
    for (; n + kStep <= columns; n += kStep)
      multiply_columns<A, kVectors>(c + n, ldc, part, right + n, ldb, rows, left);
    for (; n < columns; n += Simd<A>::kLanes)
      multiply_columns<A, 1>(c + n, ldc, part, right + n, ldb, rows, left);
  }
}

// What a row brings to its scores' gradients; see tree_attention_backward.h. Its weights are p = share *
// exp(s - top).
template <class A>
struct RowState {
  A top, share, sink_weight, shift;  // shift = grad_lse - sink_weight * delta
};

// Over the slots met so far: the largest score, the sum of exp(s - top), and that of exp(s - top) <grad_out,
// v>.
template <class A>
struct RowSums {
  A top, weights, products;
};

// e^x for x <= 80. What x * log2(e) loses to rounding, several ulp of the result for a large |x|, is put
// back.
TRANCHE_INLINE Vec exponential(Vec x) {
  const Vec log2e = vset(kLog2e), y = vmul(x, log2e);
  const Vec lost = vfma(x, vset(1.925963033500e-8f), vfms(x, log2e, y));  // log2(e) - kLog2e
  const Vec e = vexp2<6>(y);
  return vfma(e, vmul(lost, vset(0.6931471805599453f)), e);
}

TRANCHE_INLINE Mask seen(uint64_t visible, int x) {
  return mask_of_bits(uint32_t(visible >> x) & ((1u << kWidth) - 1u));
}

// Scores of a vector of products <q, k>, and their derivative by scale times the product.
TRANCHE_INLINE Vec score_of(const TreeAttentionParams& p, Vec product, Vec& slope) {
  slope = vset(1.0f);
  if (p.softcap == 0.0f) return vmul(product, vset(p.scale));
  const Vec t = vtanh(vmul(product, vset(p.scale / p.softcap)));
  slope = vsub(slope, vmul(t, t));
  return vmul(t, vset(p.softcap));
}

TRANCHE_INLINE double score_of(const TreeAttentionParams& p, double product, double& slope) {
  slope = 1.0;
  if (p.softcap == 0.0f) return product * p.scale_f64;
  const double t = __builtin_tanh(product * p.scale_f64 / double(p.softcap));
  slope -= t * t;
  return t * double(p.softcap);
}

TRANCHE_INLINE float sum_of_lanes(Vec x) {
  float lanes[kWidth], sum = 0.0f;
  vstore(lanes, x);
  for (float lane : lanes) sum += lane;
  return sum;
}

// Takes a tile's visible products <q, k> and <grad_out, v> into `sums`.
TRANCHE_INLINE void accumulate_row(const TreeAttentionParams& p, RowSums<float>& sums, uint64_t visible,
                                   const float* products, const float* gradients) {
  const Vec lowest = vset(-kInf), zero = vset(0.0f);
  Vec slope, tops = lowest;
  float lanes[kWidth], scores[kTile], top = sums.top;
  for (int x = 0; x < kTile; x += kWidth) {
    const Vec s = vselect(seen(visible, x), score_of(p, vload(products + x), slope), lowest);
    vstore(scores + x, s);
    tops = vmax(s, tops);
  }
  vstore(lanes, tops);
  for (float lane : lanes) top = lane > top ? lane : top;
  if (top == -kInf) return;
  Vec weights = zero, weighted = zero;
  for (int x = 0; x < kTile; x += kWidth) {
    const Vec e = vselect(seen(visible, x), exponential(vsub(vload(scores + x), vset(top))), zero);
    weights = vadd(weights, e);
    weighted = vfma(e, vload(gradients + x), weighted);
  }
  const float alpha = float(__builtin_exp(double(sums.top) - double(top)));
  sums = {top, sums.weights * alpha + sum_of_lanes(weights), sums.products * alpha + sum_of_lanes(weighted)};
}

TRANCHE_INLINE void accumulate_row(const TreeAttentionParams& p, RowSums<double>& sums, uint64_t visible,
                                   const double* products, const double* gradients) {
  double slope;
  for (int x = 0; x < kTile; ++x) {
    if (!(visible >> x & 1)) continue;
    const double s = score_of(p, products[x], slope), top = s > sums.top ? s : sums.top;
    if (top == -__builtin_inf()) continue;
    const double alpha = __builtin_exp(sums.top - top), e = __builtin_exp(s - top);
    sums = {top, sums.weights * alpha + e, sums.products * alpha + e * gradients[x]};
  }
}

// Products <q, k> in `scores` to weights p w, and <grad_out, v> in `gradients` to grad_x; 0 where `visible`
// has no bit.
TRANCHE_INLINE void differentiate_row(const TreeAttentionParams& p, const RowState<float>& row,
                                      uint64_t visible, float* scores, float* gradients) {
  const Vec zero = vset(0.0f), weight = vset(row.sink_weight), shift = vset(row.shift);
  for (int x = 0; x < kTile; x += kWidth) {
    Vec slope;
    const Vec s = score_of(p, vload(scores + x), slope);
    const Vec e = vmul(exponential(vsub(s, vset(row.top))), vset(row.share));
    const Vec g = vmul(vmul(e, vfma(weight, vload(gradients + x), shift)), slope);
    vstore(scores + x, vselect(seen(visible, x), vmul(e, weight), zero));
    vstore(gradients + x, vselect(seen(visible, x), g, zero));
  }
}

TRANCHE_INLINE void differentiate_row(const TreeAttentionParams& p, const RowState<double>& row,
                                      uint64_t visible, double* scores, double* gradients) {
  for (int x = 0; x < kTile; ++x) {
    if (!(visible >> x & 1)) {
      scores[x] = gradients[x] = 0.0;
      continue;
    }
    double slope;
    const double s = score_of(p, scores[x], slope), e = row.share * __builtin_exp(s - row.top);
    scores[x] = e * row.sink_weight;
    gradients[x] = e * (row.sink_weight * gradients[x] + row.shift) * slope;
  }
}

TRANCHE_INLINE float element(float x) { return x; }
TRANCHE_INLINE float element(half x) { return to_float(x); }
TRANCHE_INLINE float element(bf16 x) { return to_float(x); }
TRANCHE_INLINE double element(double x) { return x; }

template <class T, class A>
TRANCHE_INLINE T rounded(A x) {
  if constexpr (__is_same(T, double)) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

// `count` elements as A; false if one of them is not finite.
template <class T, class A>
TRANCHE_INLINE bool load_row(const T* from, A* to, int count) {
  A zero = 0;  // x - x is 0, or NaN for what is not finite
  for (int i = 0; i < count; ++i) {
    const A x = element(from[i]);
    to[i] = x;
    zero += x - x;
  }
  return zero == A(0);
}

}  // namespace tranche::cpu::TRANCHE_ISA
