// Packed weights in vector registers: a unit is 16 rows of 4 inputs, 64 bytes, in as few vectors as the
// instruction set takes for it. A decoded byte is W_l * 2^(8-l) + 128 for every l, so that nothing downstream
// depends on the precision.
#pragma once

#include "bits/packed.h"
#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

#if defined(__AVX512F__)
using Bytes = __m512i;
TRANCHE_INLINE Bytes bload(const void* p) { return _mm512_loadu_si512(p); }
TRANCHE_INLINE void bstore(void* p, Bytes x) { _mm512_storeu_si512(p, x); }
TRANCHE_INLINE Bytes bset(uint32_t word) { return _mm512_set1_epi32(int(word)); }
TRANCHE_INLINE Bytes band(Bytes x, Bytes y) { return _mm512_and_si512(x, y); }
TRANCHE_INLINE Bytes badd(Bytes x, Bytes y) { return _mm512_add_epi32(x, y); }
TRANCHE_INLINE Bytes badd_saturated(Bytes x, Bytes y) { return _mm512_adds_epu8(x, y); }
TRANCHE_INLINE Bytes bleft(Bytes x, int n) { return _mm512_slli_epi32(x, unsigned(n)); }
TRANCHE_INLINE Bytes bright(Bytes x, int n) { return _mm512_srli_epi32(x, unsigned(n)); }
TRANCHE_INLINE Bytes bselect(Bytes mask, Bytes yes, Bytes no) {
  return _mm512_ternarylogic_epi32(mask, yes, no, 0xca);
}
// x & ~(y & z)
TRANCHE_INLINE Bytes band_nand(Bytes x, Bytes y, Bytes z) { return _mm512_ternarylogic_epi32(x, y, z, 0x70); }
// Four signed bytes in every lane, ready for bdot.
using FourBytes = Bytes;
TRANCHE_INLINE FourBytes bspread(uint32_t four) { return bset(four); }
// Lanes of 32 bits: sums of four products of bytes of w, unsigned, and of x, signed.
TRANCHE_INLINE Bytes bdot(Bytes sum, Bytes w, const FourBytes& x) { return _mm512_dpbusd_epi32(sum, w, x); }
TRANCHE_INLINE Vec bfloat(Bytes lanes) { return _mm512_castsi512_ps(lanes); }
#elif defined(__AVX2__)
using Bytes = __m256i;
TRANCHE_INLINE Bytes bload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TRANCHE_INLINE void bstore(void* p, Bytes x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
TRANCHE_INLINE Bytes bset(uint32_t word) { return _mm256_set1_epi32(int(word)); }
TRANCHE_INLINE Bytes band(Bytes x, Bytes y) { return _mm256_and_si256(x, y); }
TRANCHE_INLINE Bytes badd(Bytes x, Bytes y) { return _mm256_add_epi32(x, y); }
TRANCHE_INLINE Bytes badd_saturated(Bytes x, Bytes y) { return _mm256_adds_epu8(x, y); }
TRANCHE_INLINE Bytes bleft(Bytes x, int n) { return _mm256_slli_epi32(x, n); }
TRANCHE_INLINE Bytes bright(Bytes x, int n) { return _mm256_srli_epi32(x, n); }
TRANCHE_INLINE Bytes bselect(Bytes mask, Bytes yes, Bytes no) {
  return _mm256_or_si256(_mm256_and_si256(mask, yes), _mm256_andnot_si256(mask, no));
}
TRANCHE_INLINE Bytes band_nand(Bytes x, Bytes y, Bytes z) {
  return _mm256_andnot_si256(_mm256_and_si256(y, z), x);
}
// Even and odd bytes as 16 bits: the instruction for pairs of bytes would saturate.
struct FourBytes {
  __m256i even, odd;
};
TRANCHE_INLINE FourBytes bspread(uint32_t four) {
  const __m256i x = bset(four);
  return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
TRANCHE_INLINE Bytes bdot(Bytes sum, Bytes w, const FourBytes& x) {
  const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(w, 8);
  const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(even, x.even), _mm256_madd_epi16(odd, x.odd));
  return _mm256_add_epi32(sum, both);
}
TRANCHE_INLINE Vec bfloat(Bytes lanes) { return _mm256_castsi256_ps(lanes); }
#else
typedef uint32_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Bytes8 __attribute__((vector_size(16)));
TRANCHE_INLINE Bytes bload(const void* p) {
  Bytes x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
TRANCHE_INLINE void bstore(void* p, Bytes x) { __builtin_memcpy(p, &x, sizeof x); }
TRANCHE_INLINE Bytes bset(uint32_t word) { return Bytes{word, word, word, word}; }
TRANCHE_INLINE Bytes band(Bytes x, Bytes y) { return x & y; }
TRANCHE_INLINE Bytes badd(Bytes x, Bytes y) { return x + y; }
TRANCHE_INLINE Bytes badd_saturated(Bytes x, Bytes y) {
  const Bytes8 sum = Bytes8(x) + Bytes8(y);
  return Bytes(sum | Bytes8(sum < Bytes8(x)));
}
TRANCHE_INLINE Bytes bleft(Bytes x, int n) { return x << uint32_t(n); }
TRANCHE_INLINE Bytes bright(Bytes x, int n) { return x >> uint32_t(n); }
TRANCHE_INLINE Bytes bselect(Bytes mask, Bytes yes, Bytes no) { return (mask & yes) | (~mask & no); }
TRANCHE_INLINE Bytes band_nand(Bytes x, Bytes y, Bytes z) { return x & ~(y & z); }
struct FourBytes {
  uint32_t x[4];
};
TRANCHE_INLINE FourBytes bspread(uint32_t four) {
  FourBytes to;
  for (int j = 0; j < 4; ++j) to.x[j] = uint32_t(int32_t(int8_t(four >> (8 * j))));
  return to;
}
TRANCHE_INLINE Bytes bdot(Bytes sum, Bytes w, const FourBytes& x) {
  for (int j = 0; j < 4; ++j) sum += (w >> uint32_t(8 * j) & bset(0xff)) * bset(x.x[j]);
  return sum;
}
TRANCHE_INLINE Vec bfloat(Bytes lanes) { return Vec(lanes); }
#endif

constexpr int kParts = 64 / int(sizeof(Bytes));  // vectors a unit
constexpr int kUnits = 8;                        // units a tile

static_assert(sizeof(Vec) == sizeof(Bytes), "a vector of floats holds the rows of a vector of bytes");

TRANCHE_INLINE Bytes bmove(Bytes x, int left) { return left >= 0 ? bleft(x, left) : bright(x, -left); }

// How a weight is read, as constants: single or guarded planes, how many bits of u, and whether to round
// them.
template <bool single_, int planes_, bool exact_>
struct Reading {
  static constexpr bool single = single_, exact = exact_;
  static constexpr int planes = planes_;
  static constexpr int twos = planes < 4 ? 1 : planes < 6 ? 2 : 3;  // slices of two bits
  static constexpr bool whole = planes != 4 && planes != 6;         // the last of them, with both its bits
};

// Where a row of tiles starts in each stream.
struct Streams {
  const uint8_t* two[3];  // slices of two bits, or the upper planes of u7u6, u4u3 and u2u1
  const uint8_t* one[2];  // u5, u0
  int64_t plane;          // from an upper plane to the lower one
};

// Slice i of two bits of tile t, its 64 bytes of q = 0 and of q = 1. From single planes: one plane's even
// bits are of q = 0, its odd bits of q = 1. A bit that is not read may be anything.
template <class R, int i>
TRANCHE_INLINE void load_two(const Streams& from, int64_t t, int64_t at, Bytes (&to)[2]) {
  if constexpr (!R::single) {
    to[0] = bload(from.two[i] + t * 128 + at);
    to[1] = bload(from.two[i] + t * 128 + 64 + at);
  } else {
    const Bytes high = bload(from.two[i] + t * 64 + at);
    to[0] = bleft(high, 1);
    to[1] = high;
    if constexpr (i + 1 < R::twos || R::whole) {
      const Bytes low = bload(from.two[i] + from.plane + t * 64 + at);
      to[0] = bselect(bset(0xaaaaaaaau), to[0], low);
      to[1] = bselect(bset(0xaaaaaaaau), to[1], bright(low, 1));
    }
  }
}

// Tile t of a row of tiles: calls take(unit, part, bytes) for its units in turn.
template <class R, class F>
TRANCHE_INLINE void decode_tile(const Streams& from, int64_t t, Rounding rounding, const F& take) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    const int64_t at = int(sizeof(Bytes)) * i;
    Bytes bits76[2], bits43[2], bits21[2], bit0;
    load_two<R, 0>(from, t, at, bits76);
    const Bytes bit5 = bload(from.one[0] + t * 64 + at);
    if constexpr (R::twos > 1) load_two<R, 1>(from, t, at, bits43);
    if constexpr (R::twos > 2) load_two<R, 2>(from, t, at, bits21);
    if constexpr (R::planes == 8) bit0 = bload(from.one[1] + t * 64 + at);
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) {
      if constexpr (R::planes == 3) {
        // Four fields of two bits a byte: add the guard bit to those that are not 3, all at once.
        const Bytes guard = band(q ? bright(bit5, 1) : bit5, bset(0x55555555u));
        const Bytes rounded = badd(bits76[q], band_nand(guard, bits76[q], bright(bits76[q], 1)));
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          take(4 * q + s, i, band(bleft(rounded, 6 - 2 * s), bset(0xc0c0c0c0u)));
        }
      } else {
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          Bytes x = bselect(bset(0xc0c0c0c0u), bleft(bits76[q], 6 - 2 * s), bmove(bit5, 5 - 2 * s - q));
          x = bselect(bset(0xe0e0e0e0u), x, bmove(bits43[q], 3 - 2 * s));
          if constexpr (R::twos > 2) x = bselect(bset(0xf8f8f8f8u), x, bmove(bits21[q], 1 - 2 * s));
          if constexpr (R::planes == 8) x = bselect(bset(0xfefefefeu), x, bright(bit0, 2 * s + q));
          if constexpr (!R::exact) x = band(badd_saturated(x, bset(rounding.half)), bset(rounding.keep));
          take(4 * q + s, i, x);
        }
      }
    }
  }
}

// Brings a tile of later nearer, into all caches: so many streams at once are more than hardware foresees.
template <class R>
TRANCHE_INLINE void prefetch_tile(const Streams& from, int64_t t) {
#pragma GCC unroll 3
  for (int i = 0; i < R::twos; ++i) {
    __builtin_prefetch(from.two[i] + t * (R::single ? 64 : 128));
    if (R::single && i + 1 == R::twos && !R::whole) continue;
    __builtin_prefetch(from.two[i] + (R::single ? from.plane + t * 64 : t * 128 + 64));
  }
  __builtin_prefetch(from.one[0] + t * 64);
  if constexpr (R::planes == 8) __builtin_prefetch(from.one[1] + t * 64);
}

// f with the Reading that a weight in guarded planes asks for, in single planes, or in either.
template <class F>
TRANCHE_INLINE void with_guarded_reading(const PackedWeight& w, const F& f) {
  switch (w.planes) {
    case 3:
      return f(Reading<false, 3, false>());
    case 5:
      return f(Reading<false, 5, false>());
    case 7:
      return f(Reading<false, 7, false>());
    default:
      return w.bits == 8 ? f(Reading<false, 8, true>()) : f(Reading<false, 8, false>());
  }
}

template <class F>
TRANCHE_INLINE void with_single_reading(const PackedWeight& w, const F& f) {
  switch (w.planes) {
    case 3:
      return f(Reading<true, 3, false>());
    case 4:
      return f(Reading<true, 4, false>());
    case 5:
      return f(Reading<true, 5, false>());
    case 6:
      return f(Reading<true, 6, false>());
    case 7:
      return f(Reading<true, 7, false>());
    default:
      return w.bits == 8 ? f(Reading<true, 8, true>()) : f(Reading<true, 8, false>());
  }
}

template <class F>
TRANCHE_INLINE void with_reading(const PackedWeight& w, const F& f) {
  w.single ? with_single_reading(w, f) : with_guarded_reading(w, f);
}

TRANCHE_INLINE Streams streams_of(const PackedWeight& w, int64_t tile) {
  if (w.single) {
    return {{plane_stream(w, 0, tile), plane_stream(w, 3, tile), plane_stream(w, 5, tile)},
            {plane_stream(w, 2, tile), plane_stream(w, 7, tile)},
            kPlaneBytes * w.row_tiles * w.input_tiles};
  }
  return {{slice_stream(w, 0, tile), slice_stream(w, 2, tile), slice_stream(w, 3, tile)},
          {slice_stream(w, 1, tile), slice_stream(w, 4, tile)},
          0};
}

template <class R>
static void decode_run(const Streams& from, int64_t begin, int64_t end, int64_t ahead, Rounding rounding,
                       uint8_t* to) {
  for (int64_t t = begin; t < end; ++t) {
    prefetch_tile<R>(from, t + ahead);
    uint8_t* units = to + (t - begin) * kTileBytes8;
    decode_tile<R>(from, t, rounding, [units](int unit, int part, Bytes x) {
      bstore(units + 64 * unit + int(sizeof(Bytes)) * part, x);
    });
  }
}

// Tiles [begin, end) of a row of tiles in the plain layout: decoded to `to`, or where they already are. What
// will be read next lies `ahead` tiles later.
[[maybe_unused]] static const uint8_t* decode_tiles(const PackedWeight& w, int64_t row_tile, int64_t begin,
                                                    int64_t end, int64_t ahead, uint8_t* to) {
  const int64_t tile = row_tile * w.input_tiles;
  if (w.planes == 0) {
    const uint8_t* plain = w.data + (tile + begin) * kTileBytes8;
    for (int64_t at = 0; at < (end - begin) * kTileBytes8; at += 64) {
      __builtin_prefetch(plain + ahead * kTileBytes8 + at);
    }
    return plain;
  }
  with_reading(w, [&](auto reading) {
    decode_run<decltype(reading)>(streams_of(w, tile), begin, end, ahead, rounding_of_bits(w.bits), to);
  });
  return to;
}

// Tiles [begin, end) of a row of tiles times one row of codes, of which x is what meets the first: adds to
// the totals of 16 outputs. Here weights meet x as they are decoded, and in registers.
template <class R>
static void dot_run(const Streams& from, int64_t begin, int64_t end, Rounding rounding, const uint32_t* x,
                    uint32_t* totals) {
  constexpr int64_t kAhead = 32;  // tiles
  constexpr int kChains = kParts == 1 ? kUnits : kParts == 2 ? 2 : 1;
  Bytes sum[kParts][kChains];
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) sum[i][c] = bset(0);
  }
  for (int64_t t = begin; t < end; ++t) {
    prefetch_tile<R>(from, t + kAhead);
    const uint32_t* words = x + (t - begin) * kUnits;
    decode_tile<R>(from, t, rounding, [&](int unit, int part, Bytes w) {
      sum[part][unit % kChains] = bdot(sum[part][unit % kChains], w, bspread(words[unit]));
    });
  }
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    uint32_t* total = totals + i * int(sizeof(Bytes)) / 4;
    Bytes all = bload(total);
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) all = badd(all, sum[i][c]);
    bstore(total, all);
  }
}

[[maybe_unused]] static void dot_tiles(const PackedWeight& w, int64_t row_tile, int64_t begin, int64_t end,
                                       const uint32_t* x, uint32_t* totals) {
  with_reading(w, [&](auto reading) {
    dot_run<decltype(reading)>(streams_of(w, row_tile * w.input_tiles), begin, end, rounding_of_bits(w.bits),
                               x, totals);
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA
