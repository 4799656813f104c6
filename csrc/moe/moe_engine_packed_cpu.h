// The engines of packed experts without tiles: the lanes of a vector are the 16 rows, as decoding leaves
// them, and meet an element (FMA) or a pair of elements (AVX-512 BF16) of every column in turn.
//
// Sums of a row and a column are four chains over all k, vector after vector, which a fixed tree adds.
#pragma once

#include "bits/decode_cpu.h"
#include "moe/moe_engine_cpu.h"
#include "moe/moe_experts.h"

namespace tranche::cpu::TRANCHE_ISA {

template <>
struct Rows<Packed> {
  PackedWeight w;

  // Where the product after this one reads is no news: streams go on from one row of tiles to the next.
  const Packed* row(int64_t) const { return nullptr; }
};

// Byte j of every lane, less 128, as float: the byte becomes the low mantissa of 2^23.
TRANCHE_INLINE Vec float_of_byte(Bytes unit, int j) {
  const Bytes shifted = j == 0 ? unit : bright(unit, 8 * j);
  return vsub(bfloat(bselect(bset(0xffu), shifted, bset(0x4b000000u))), vset(8388608.0f + 128.0f));
}

// fp32 columns. A unit (4 inputs) becomes four vectors of floats.
struct PackedFmaLanes {
  using Element = float;
  static constexpr int kSteps = 4;

  template <class R>
  TRANCHE_INLINE Bytes weights(Bytes unit, int j) {
    Bytes bits;
    const Vec w = float_of_byte(unit, j);
    __builtin_memcpy(&bits, &w, sizeof bits);
    return bits;
  }
  TRANCHE_INLINE Vec dot(Vec sum, Bytes w, const char* x) {
    float value;
    __builtin_memcpy(&value, x, sizeof value);
    return vfma(bfloat(w), vset(value), sum);
  }
  template <class T>
  TRANCHE_INLINE void pack(const T* from, float* to, int n) {
    if constexpr (__is_same(T, float)) {
      memcpy(to, from, size_t(n) * sizeof(float));
    } else {
      row_to_float(from, to, n);
    }
  }
  TRANCHE_INLINE void put(const float* values, float* to) { memcpy(to, values, kTileRows * sizeof(float)); }
};

#if defined(__AVX512BF16__)

// bf16 of 8 i - 128, which the upper five bits of a byte name.
struct FewBits {
  alignas(64) uint16_t words[32];
  constexpr FewBits() : words() {
    for (int i = 0; i < 32; ++i) words[i] = uint16_t(__builtin_bit_cast(uint32_t, float(8 * i - 128)) >> 16);
  }
};
static constexpr FewBits kFewBits;

// bf16 columns. A unit becomes two vectors of pairs: inputs 0 and 2, then 1 and 3, since even and odd bytes
// part most easily; columns are kept in that order. Codes of 8 bits are exact in bf16.
struct PackedDotLanes {
  using Element = uint16_t;
  static constexpr int kSteps = 2;

  template <class R>
  TRANCHE_INLINE Bytes weights(Bytes unit, int j) {
    if constexpr (R::planes <= 5) {  // at most four bits: the index is what the word's low five say
      return _mm512_permutexvar_epi16(_mm512_srli_epi16(unit, j == 0 ? 3 : 11), bload(kFewBits.words));
    } else {
      const Bytes low = _mm512_castps_si512(float_of_byte(unit, j));
      const Bytes high = _mm512_castps_si512(float_of_byte(unit, j + 2));
      return bselect(bset(0xffff0000u), high, bright(low, 16));
    }
  }
  TRANCHE_INLINE Vec dot(Vec sum, Bytes w, const char* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
  }
  // Of every four the first with the third, and the second with the fourth.
  TRANCHE_INLINE __m512i in_pairs(__m512i x) {
    return _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(x, 0xd8), 0xd8);
  }
  TRANCHE_INLINE void pack(const bf16* from, uint16_t* to, int n) {
    for (int k = 0; k < n; k += kTileInputs) {
      const __mmask32 mask = n - k >= kTileInputs ? ~__mmask32(0) : (__mmask32(1) << (n - k)) - 1;
      _mm512_storeu_si512(to + k, in_pairs(_mm512_maskz_loadu_epi16(mask, from + k)));
    }
  }
  TRANCHE_INLINE void put(const float* values, uint16_t* to) {
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(vload(values)));
    const __m512i paired = in_pairs(_mm512_castsi256_si512(rounded));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(paired));
  }
};

#endif

// Tile t of 16 rows: take(vector, part, weights) for each vector of weights, numbered in the order of k.
template <class Lanes, class R, class F>
TRANCHE_INLINE void decode_weights(const Streams& from, int64_t t, Rounding rounding, const F& take) {
  decode_tile<R>(from, t, rounding, [&](int unit, int part, Bytes x) {
#pragma GCC unroll 4
    for (int j = 0; j < Lanes::kSteps; ++j) {
      take(unit * Lanes::kSteps + j, part, Lanes::template weights<R>(x, j));
    }
  });
}

constexpr int64_t kPackedAhead = 16;  // tiles

template <class Lanes>
class PackedLaneEngine {
 public:
  using Compute = float;
  using Element = typename Lanes::Element;
  struct Session {};
  static constexpr int kTilesTogether = 1;

  // From column to column: a line more than the depth, so that columns do not share sets of the L1 cache.
  static int64_t padded(int depth) { return round_up(depth, kTileInputs) + 64 / int(sizeof(Element)); }
  static int64_t panel_bytes(int depth) { return kPanel * padded(depth) * int64_t(sizeof(Element)); }
  static int64_t scratch_bytes() { return (kRun * kVectors + kGroupColumns * kChains) * 64; }

  template <class T>
  static void pack(const T* const (&rows)[kPanel], int depth, void* panel) {
    Element* to = static_cast<Element*>(panel);
    const int64_t pad = padded(depth);
    memset(to, 0, size_t(panel_bytes(depth)));
    for (int c = 0; c < kPanel; ++c, to += pad) {
      if (rows[c]) Lanes::pack(rows[c], to, depth);
    }
  }

  static void put(void* panel, int depth, int column, int first_row, const float* values) {
    Lanes::put(values, static_cast<Element*>(panel) + column * padded(depth) + first_row);
  }

  static void product(const Rows<Packed>& rows, int first_row, const void* panels, int columns, float* result,
                      void* scratch, const Packed*) {
    const PackedWeight& w = rows.w;
    const Streams from = streams_of(w, first_row / kTileRows * w.input_tiles);
    const Rounding rounding = rounding_of_bits(w.bits);
    const int64_t column_bytes = padded(int(w.in_features)) * int64_t(sizeof(Element));
    char* staged = static_cast<char*>(scratch);
    float* sums = reinterpret_cast<float*>(staged + kRun * kVectors * 64);
    with_guarded_reading(w, [&](auto reading) {
      using R = decltype(reading);
      for (int64_t t = 0; t < w.input_tiles; t += kRun) {
        const int64_t end = least(t + kRun, w.input_tiles);
        for (int64_t i = t; i < end; ++i) {
          prefetch_tile<R>(from, i + kPackedAhead);
          char* to = staged + (i - t) * kVectors * 64;
          decode_weights<Lanes, R>(from, i, rounding, [&](int v, int part, Bytes x) {
            bstore(to + 64 * v + int(sizeof x) * part, x);
          });
        }
        const char* x = static_cast<const char*>(panels) + t * kVectors * 4;
        multiply(staged, int(end - t) * kVectors, x, column_bytes, columns, t == 0, sums);
      }
    });
    for (int c = 0; c < columns; ++c) {
      for (int part = 0; part < kParts; ++part) {
        const float* chains = sums + (c * kParts + part) * kChains * kWidth;
        const Vec low = vadd(vload(chains), vload(chains + kWidth));
        const Vec high = vadd(vload(chains + 2 * kWidth), vload(chains + 3 * kWidth));
        vstore(result + c * kTileRows + part * kWidth, vadd(low, high));
      }
    }
  }

 private:
  static constexpr int kVectors = kUnits * Lanes::kSteps;  // of a tile, each of 16 rows, a word of x for each
  static constexpr int kRun = 4;                           // tiles decoded at a time, into L1
  static constexpr int kChains = 4;
  static constexpr int kSums = kParts * kChains;  // vectors of a column
#if defined(__AVX512F__)
  static constexpr int kColumns = 4;  // 16 sums of 32 registers
#else
  static constexpr int kColumns = 2;  // 8 of 16
#endif

  static void multiply(const char* w, int vectors, const char* x, int64_t column_bytes, int columns,
                       bool first, float* sums) {
    for (int c = 0; c < columns; c += kColumns) {
      const char* at = x + c * column_bytes;
      float* to = sums + c * kSums * kWidth;
      switch (least(columns - c, kColumns)) {
        case 1:
          multiply_columns<1>(w, vectors, at, column_bytes, first, to);
          break;
        case 2:
          multiply_columns<2>(w, vectors, at, column_bytes, first, to);
          break;
#if defined(__AVX512F__)
        case 3:
          multiply_columns<3>(w, vectors, at, column_bytes, first, to);
          break;
        default:
          multiply_columns<4>(w, vectors, at, column_bytes, first, to);
#endif
      }
    }
  }

  template <int columns>
  static void multiply_columns(const char* w, int vectors, const char* x, int64_t column_bytes, bool first,
                               float* sums) {
    for (int part = 0; part < kParts; ++part) {
      Vec acc[columns][kChains];
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) {
        const float* from = sums + (c * kParts + part) * kChains * kWidth;
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) acc[c][i] = first ? vset(0.0f) : vload(from + i * kWidth);
      }
      const char* at = w + part * int(sizeof(Vec));
      for (int v = 0; v < vectors; v += kChains) {
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) {
          const Bytes weights = bload(at + 64 * (v + i));
#pragma GCC unroll 4
          for (int c = 0; c < columns; ++c) {
            acc[c][i] = Lanes::dot(acc[c][i], weights, x + c * column_bytes + 4 * (v + i));
          }
        }
      }
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) {
        float* to = sums + (c * kParts + part) * kChains * kWidth;
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i) vstore(to + i * kWidth, acc[c][i]);
      }
    }
  }
};

using PackedFmaEngine = PackedLaneEngine<PackedFmaLanes>;
#if defined(__AVX512BF16__)
using PackedDotEngine = PackedLaneEngine<PackedDotLanes>;
#endif

}  // namespace tranche::cpu::TRANCHE_ISA
