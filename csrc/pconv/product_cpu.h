// out[p][n] = bias[n] + sum over segments s, d of x[p * step + offset[s] + d] * w[s][d][n]: the one loop nest
// behind the family's convolutions (segments are taps) and 1x1 layers.
//
// Vector lanes are outputs. Each output is one chain of FMAs in which s and then d ascend, so that a result
// depends on nothing but its own inputs, whatever block it was computed in and however the chain was cut.
#pragma once

#include "core/arena.h"
#include "core/constant.h"
#include "pconv/ahead_cpu.h"
#include "pconv/layout_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int64_t kPanel = 32;  // outputs that are computed, and whose weights are stored, together
// Where a layer has so many weights for each pixel, or more, threads share its outputs instead of the pixels.
constexpr int64_t kWeightsOfPixel = 4096;
constexpr int64_t kSecondLevel =
    512 << 10;  // bytes of weights that a second-level cache keeps beside the rest

// The arithmetic of a product. A Unit is what one lane multiplies at a time, kPair elements of type X.
struct F32 {
  using X = float;
  using A = float;
  using Unit = float;
  using V = Vec;
  static constexpr int kPair = 1, kLanes = kWidth;
  TRANCHE_INLINE V load(const A* p) { return vload(p); }
  TRANCHE_INLINE void store(A* p, V x) { vstore(p, x); }
  TRANCHE_INLINE V weights(const Unit* p) { return vload(p); }
  TRANCHE_INLINE V fma(Unit x, V w, V sum) { return vfma(vset(x), w, sum); }
  TRANCHE_INLINE V lanes(V x, V w, V sum) { return vfma(x, w, sum); }
};

struct F64 {
  using X = double;
  using A = double;
  using Unit = double;
  static constexpr int kPair = 1, kLanes = kWidth / 2;
  typedef double V __attribute__((vector_size(8 * (kWidth / 2))));
  TRANCHE_INLINE V load(const A* p) {
    V x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  TRANCHE_INLINE void store(A* p, V x) { __builtin_memcpy(p, &x, sizeof x); }
  TRANCHE_INLINE V weights(const Unit* p) { return load(p); }
  TRANCHE_INLINE V fma(Unit x, V w, V sum) { return x * w + sum; }
  TRANCHE_INLINE V lanes(V x, V w, V sum) { return x * w + sum; }
};

#if defined(__AVX512BF16__)
// Two bf16 of neighbouring channels at a time, summed in float.
struct B16 {
  using X = bf16;
  using A = float;
  using Unit = uint32_t;
  using V = Vec;
  static constexpr int kPair = 2, kLanes = kWidth;
  TRANCHE_INLINE V load(const A* p) { return vload(p); }
  TRANCHE_INLINE void store(A* p, V x) { vstore(p, x); }
  TRANCHE_INLINE __m512i weights(const Unit* p) { return _mm512_loadu_si512(p); }
  TRANCHE_INLINE V fma(Unit x, __m512i w, V sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w),
                            reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(x))));
  }
};
#endif

// Which arithmetic serves elements of type T.
template <class T>
struct KindOf {
  using type = F32;
};
template <>
struct KindOf<double> {
  using type = F64;
};
#if defined(__AVX512BF16__)
template <>
struct KindOf<bf16> {
  using type = B16;
};
#endif

template <class K>
TRANCHE_INLINE int64_t units(int64_t elements) {
  return (elements + K::kPair - 1) / K::kPair;
}

// `units` of a pixel, or some more so that every `step`-th pixel lies at another place of the first-level
// cache: a product takes several together, which 4 KB apart would share one set of it and drive each other
// out.
template <class Unit>
TRANCHE_INLINE int64_t spread(int64_t units, int64_t step = 1) {
  constexpr int64_t kLine = 64 / sizeof(Unit), kSets = 4096 / sizeof(Unit);
  return units * step % kSets == 0 ? units + kLine : units;
}

TRANCHE_INLINE int64_t panels(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// One panel of outputs for `runs` runs of equally spaced pixels.
template <class K>
struct Product {
  const typename K::Unit* x;
  int64_t step, run_step;  // units between the pixels of a run, and between runs
  const int64_t* offset;   // [segments] units
  int64_t segments, depth;
  const typename K::Unit* w;  // [segments][depth][kPanel]
  const typename K::A* bias;  // [kPanel]
  typename K::A* out;         // [runs][pixels][kPanel]
  int64_t runs, pixels;
  bool fetch_ahead;  // the weights of all panels exceed the second-level cache, and lie one after the other
  Ahead* ahead;      // what else to ask for, some of it beside each block; or null
};

// Pixels that a block of a product takes, with kVectors of outputs: sums, weights and one value of x fill 32
// registers on AVX-512, 16 elsewhere. Images are often 56, 28, 14 or 7 pixels wide.
template <int kVectors>
constexpr int kBlockPixels = kWidth == 16 ? 28 / kVectors : 12 / kVectors;

template <class K, int kRows, int kVectors>
TRANCHE_INLINE void product_block(const Product<K>& a, int64_t segment, int64_t segments,
                                  const typename K::Unit* x, typename K::A* out, int64_t column) {
  using Unit = typename K::Unit;
  constexpr int kThirds = (kRows + 2) / 3;
  typename K::V sum[kRows][kVectors];
  out += column;
  // Two loops, not one with a step: addresses are constants apart then, and small products a tenth faster.
  if (segment == 0) {
    const typename K::A* bias = a.bias + column;
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = K::load(bias + v * K::kLanes);
    }
  } else {
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = K::load(out + r * kPanel + v * K::kLanes);
    }
  }
  const int64_t step = a.step;
  const Unit* w = a.w + segment * a.depth * kPanel + column;
  for (int64_t s = segment; s < segment + segments; ++s) {
    // A pointer for every third row: the others are reached from it by what an address can add.
    const Unit* at[kThirds];
#pragma GCC unroll 16
    for (int t = 0; t < kThirds; ++t) at[t] = x + a.offset[s] + 3 * t * step;
    for (int64_t d = 0; d < a.depth; ++d, w += kPanel) {
      decltype(K::weights(w)) weight[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weight[v] = K::weights(w + v * K::kLanes);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        const Unit value = at[r / 3][r % 3 * step];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = K::fma(value, weight[v], sum[r][v]);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kThirds; ++t) ++at[t];
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) K::store(out + r * kPanel + v * K::kLanes, sum[r][v]);
  }
}

template <class K, int kVectors>
static void product_columns(const Product<K>& a, int64_t segment, int64_t segments, int64_t column) {
  constexpr int kMost = kBlockPixels<kVectors>;
  // While this piece of the weights is used, as much of what follows is asked for.
  const int64_t bytes = segments * a.depth * kPanel * int64_t(sizeof(typename K::Unit));
  Ahead weights;
  if (a.fetch_ahead) {
    weights = Ahead(a.w + (segment + segments) * a.depth * kPanel, 1, 0, bytes,
                    most<int64_t>(1, a.runs * a.pixels / kMost));
  }
  for (int64_t run = 0; run < a.runs; ++run) {
    const typename K::Unit* x = a.x + run * a.run_step;
    typename K::A* out = a.out + run * a.pixels * kPanel;
    const auto rows = [&](auto count) {
      constexpr int kRows = decltype(count)::value;
      product_block<K, kRows, kVectors>(a, segment, segments, x, out, column);
      x += kRows * a.step;
      out += kRows * kPanel;
      weights.ask();
      if (a.ahead) a.ahead->ask();
    };
    int64_t left = a.pixels;
    for (; left >= kMost; left -= kMost) rows(Constant<kMost>());
    if constexpr (kMost == 28) {
      if (left >= 14) rows(Constant<14>()), left -= 14;
    }
    if constexpr (kMost >= 14) {
      if (left >= 7) rows(Constant<7>()), left -= 7;
    }
    for (; left >= 4; left -= 4) rows(Constant<4>());
    if (left >= 2) rows(Constant<2>()), left -= 2;
    if (left >= 1) rows(Constant<1>());
  }
}

// Segments whose weights stay in the first-level cache.
template <class K>
TRANCHE_INLINE int64_t piece_segments(int64_t depth) {
  constexpr int64_t kPieceBytes = 32 << 10;
  const int64_t segment_bytes = depth * kPanel * int64_t(sizeof(typename K::Unit));
  return most<int64_t>(1, kPieceBytes / most<int64_t>(1, segment_bytes));
}

// The panel's first `columns` outputs; what is written beyond them is of no meaning. Weights are taken in
// pieces that stay in the first-level cache while all pixels pass by.
template <class K>
static void product(const Product<K>& a, int64_t columns) {
  const int64_t piece = piece_segments<K>(a.depth);
  for (int64_t column = 0; column < columns; column += 2 * K::kLanes) {
    for (int64_t s = 0; s < a.segments; s += piece) {
      const int64_t count = least(piece, a.segments - s);
      columns - column > K::kLanes ? product_columns<K, 2>(a, s, count, column)
                                   : product_columns<K, 1>(a, s, count, column);
    }
  }
}

// ---- weights [n][depth][segments] to panels [segments][depth][kPanel], zeros beyond n and depth

TRANCHE_INLINE void put(float* cell, int, float value) { *cell = value; }
TRANCHE_INLINE void put(double* cell, int, double value) { *cell = value; }
TRANCHE_INLINE void put(uint32_t* cell, int half, bf16 value) {
  *cell = half ? *cell | uint32_t(value.bits) << 16 : value.bits;
}

template <class K, class T>
TRANCHE_INLINE typename K::X as_element(T x) {
  if constexpr (__is_same(T, typename K::X)) {
    return x;
  } else {
    return to_float(x);
  }
}

#if defined(__AVX512F__)
template <class T>
TRANCHE_INLINE __m512i load_lanes(const T* from, int n, bool as_bits) {
  if constexpr (__is_same(T, bf16)) {
    if (as_bits) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1u), from));
  }
  return _mm512_castps_si512(load16(from, n));
}
#endif

// Outputs [first, first + kPanel) of n. `weight` is contiguous.
template <class K, class T>
static void pack_panel(const T* weight, int64_t n, int64_t depth, int64_t segments, int64_t first,
                       typename K::Unit* panel) {
  const int64_t all = depth * segments, unit_depth = units<K>(depth);
  const auto row_of = [&](int64_t k) {
    return panel + (k % segments * unit_depth + k / segments / K::kPair) * kPanel;
  };
#if defined(__AVX512F__)
  if constexpr (!__is_same(T, double)) {
    for (int64_t half = 0; half < kPanel; half += 16) {
      const int64_t live = most<int64_t>(0, least<int64_t>(16, n - first - half));
      if constexpr (K::kPair == 2) {
        if (segments == 1) {  // pairs lie side by side already
          for (int64_t k = 0; k < all; k += 32) {
            const int64_t count = least<int64_t>(32, all - k);
            const __mmask32 mask = count == 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
            __m512i rows[16];
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) {
              rows[r] = r < live ? _mm512_maskz_loadu_epi16(mask, weight + (first + half + r) * all + k)
                                 : _mm512_setzero_si512();
            }
            transpose16(rows);
            typename K::Unit* to = panel + k / 2 * kPanel + half;
            for (int r = 0; r < int(units<K>(count)); ++r) _mm512_storeu_si512(to + r * kPanel, rows[r]);
          }
          continue;
        }
      }
      for (int64_t k = 0; k < all; k += 16) {
        const int count = int(least<int64_t>(16, all - k));
        __m512i rows[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          rows[r] = r < live ? load_lanes(weight + (first + half + r) * all + k, count, K::kPair == 2)
                             : _mm512_setzero_si512();
        }
        transpose16(rows);
        int64_t element = k / segments, segment = k % segments;
        for (int r = 0; r < count; ++r) {
          typename K::Unit* to = panel + (segment * unit_depth + element / K::kPair) * kPanel + half;
          const bool second = K::kPair == 2 && element % 2 == 1;
          const __m512i row =
              second ? _mm512_or_si512(_mm512_loadu_si512(to), _mm512_slli_epi32(rows[r], 16)) : rows[r];
          _mm512_storeu_si512(to, row);
          if (++segment == segments) segment = 0, ++element;
        }
      }
    }
    return;
  }
#endif
  for (int64_t k = 0; k < all; ++k) {
    typename K::Unit* row = row_of(k);
    for (int64_t o = 0; o < kPanel; ++o) {
      const typename K::X value =
          first + o < n ? as_element<K>(weight[(first + o) * all + k]) : typename K::X{};
      put(row + o, int(k / segments % K::kPair), value);
    }
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA
