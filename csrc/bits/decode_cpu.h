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

// 64 bytes of a tile as four fields of two bits a byte, inputs 4s .. 4s+3 in the field at bit 2s: by bits of
// u, upper ones first, and by q. A pair is two neighbours of u whatever the slices; bits that are not read
// may be anything.
struct Pairs {
  Bytes of[4][2];  // u7u6, u5u4, u3u2, u1u0
  Bytes u5;        // of both q, as it was read
};

// Of two planes: one's even bits are of q = 0, its odd bits of q = 1.
TRANCHE_INLINE void pair_planes(Bytes high, Bytes low, Bytes (&to)[2]) {
  to[0] = bselect(bset(0xaaaaaaaau), bleft(high, 1), low);
  to[1] = bselect(bset(0xaaaaaaaau), high, bright(low, 1));
}

template <class R>
TRANCHE_INLINE Pairs load_pairs(const Streams& from, int64_t t, int64_t at) {
  Pairs pairs;
  pairs.u5 = bload(from.one[0] + t * 64 + at);
  if constexpr (R::single) {
    const auto plane = [&](const uint8_t* stream) { return bload(stream + t * 64 + at); };
    pair_planes(plane(from.two[0]), plane(from.two[0] + from.plane), pairs.of[0]);
    if constexpr (R::planes > 3) pair_planes(pairs.u5, plane(from.two[1]), pairs.of[1]);
    if constexpr (R::planes > 4) {
      const Bytes u3 = plane(from.two[1] + from.plane);
      pair_planes(u3, R::planes > 5 ? plane(from.two[2]) : u3, pairs.of[2]);
    }
    if constexpr (R::planes > 6) {
      const Bytes u1 = plane(from.two[2] + from.plane);
      pair_planes(u1, R::planes > 7 ? plane(from.one[1]) : u1, pairs.of[3]);
    }
    return pairs;
  }
  [[maybe_unused]] const Bytes upper = bset(0xaaaaaaaau);
  [[maybe_unused]] Bytes u0;
  if constexpr (R::planes > 7) u0 = bload(from.one[1] + t * 64 + at);
#pragma GCC unroll 2
  for (int q = 0; q < 2; ++q) {
    const auto slice = [&](int i) { return bload(from.two[i] + t * 128 + 64 * q + at); };
    pairs.of[0][q] = slice(0);
    if constexpr (R::planes > 3) {
      const Bytes u4u3 = slice(1);
      pairs.of[1][q] = bselect(upper, q == 0 ? bleft(pairs.u5, 1) : pairs.u5, bright(u4u3, 1));
      pairs.of[2][q] = bleft(u4u3, 1);
    }
    if constexpr (R::planes > 5) {
      const Bytes u2u1 = slice(2);
      pairs.of[2][q] = bselect(upper, pairs.of[2][q], bright(u2u1, 1));
      pairs.of[3][q] = bleft(u2u1, 1);
    }
    if constexpr (R::planes > 7) {
      pairs.of[3][q] = bselect(upper, pairs.of[3][q], q == 0 ? u0 : bright(u0, 1));
    }
  }
  return pairs;
}

// Tile t of a row of tiles: calls take(unit, part, bytes) for its units in turn. Of three planes a field may
// stay in its place, 6 - 2s bits too low.
template <class R, bool in_place = false, class F>
TRANCHE_INLINE void decode_tile(const Streams& from, int64_t t, Rounding rounding, const F& take) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    const Pairs pairs = load_pairs<R>(from, t, int(sizeof(Bytes)) * i);
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) {
      const Bytes u76 = pairs.of[0][q];
      if constexpr (R::planes == 3) {
        // Four fields of two bits a byte: add the guard bit to those that are not 3, all at once.
        const Bytes guard = band(q == 0 ? pairs.u5 : bright(pairs.u5, 1), bset(0x55555555u));
        const Bytes rounded = badd(u76, band_nand(guard, u76, bright(u76, 1)));
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          const int left = in_place ? 0 : 6 - 2 * s;
          take(4 * q + s, i, band(bleft(rounded, left), bset(0x03030303u << (2 * s + left))));
        }
      } else {
        // Halves of bytes, which an operation makes for two fields at once: s = 0 and 2, s = 1 and 3.
        const Bytes u54 = pairs.of[1][q], fields = bset(0xccccccccu), halves = bset(0xf0f0f0f0u);
        const Bytes high[2] = {bselect(fields, bleft(u76, 2), u54), bselect(fields, u76, bright(u54, 2))};
        Bytes low[2];
        if constexpr (R::planes > 4) {
          const Bytes u32 = pairs.of[2][q];
          low[0] = bleft(u32, 2);
          low[1] = u32;
          if constexpr (R::planes > 6) {
            low[0] = bselect(fields, low[0], pairs.of[3][q]);
            low[1] = bselect(fields, low[1], bright(pairs.of[3][q], 2));
          }
        }
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          Bytes x = s < 2 ? bleft(high[s % 2], 4) : high[s % 2];
          if constexpr (R::planes > 4) x = bselect(halves, x, s < 2 ? low[s % 2] : bright(low[s % 2], 4));
          if constexpr (!R::exact) x = band(badd_saturated(x, bset(rounding.half)), bset(rounding.keep));
          take(4 * q + s, i, x);
        }
      }
    }
  }
}

// Where a row of tiles is read from end to end: what is asked for, in tiles ahead. In lines it is the same at
// every precision: fewer come late, and twice as many drive one another out of L1 before they are used.
TRANCHE_INLINE constexpr int64_t tiles_ahead(int planes) {
  constexpr int kLines = 128;
  return kLines / (planes > 0 ? planes : kTileBytes8 / 64);
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
  constexpr int kChains = kParts == 1 ? kUnits : kParts == 2 ? 2 : 1;
  Bytes sum[kParts][kChains];
  constexpr bool in_place = R::planes == 3 && kChains == kUnits;  // a chain is of one place
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) sum[i][c] = bset(0);
  }
  for (int64_t t = begin; t < end; ++t) {
    prefetch_tile<R>(from, t + tiles_ahead(R::planes));
    const uint32_t* words = x + (t - begin) * kUnits;
    decode_tile<R, in_place>(from, t, rounding, [&](int unit, int part, Bytes w) {
      sum[part][unit % kChains] = bdot(sum[part][unit % kChains], w, bspread(words[unit]));
    });
  }
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    uint32_t* total = totals + i * int(sizeof(Bytes)) / 4;
    Bytes all = bload(total);
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c)
      all = badd(all, in_place ? bleft(sum[i][c], 6 - 2 * (c % 4)) : sum[i][c]);
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
