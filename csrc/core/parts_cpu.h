// A float as the exact sum of three bf16, x = h + m + l, each of 8 bits, for products on tiles of bf16: x * w
// is h*h + h*m + m*h + m*m + h*l + l*h, and what is left out is below 2^-24 of it (Henry, Tang, Heinecke
// 2019, arXiv 1904.06376).
#pragma once

#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

// The parts of 16 floats, in the upper halves of their lanes: x cut off after 8 bits, so that nothing finite
// becomes infinite, the rest rounded to 8 bits, and what is left. Of infinity and NaN the others are 0.
TRANCHE_INLINE void parts_of(Vec x, Vec (&part)[3]) {
  // for fixupimm, a response for each class of number: a NaN stays one whatever bits are cut off, and a rest
  // that is NaN is 0
  constexpr int kNanOfSource = 0x22, kZeroForNan = 0x88;
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
  const auto cut = [&](__m512i bits) { return _mm512_castsi512_ps(_mm512_and_si512(bits, upper)); };
  part[0] = cut(_mm512_castps_si512(x));
  part[0] = _mm512_fixupimm_ps(part[0], x, _mm512_set1_epi32(kNanOfSource), 0);
  Vec rest = vsub(x, part[0]);
  rest = _mm512_fixupimm_ps(rest, rest, _mm512_set1_epi32(kZeroForNan), 0);
  part[1] = cut(_mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000)));
  part[2] = vsub(rest, part[1]);
}

// The upper halves of 32 lanes, side by side.
TRANCHE_INLINE __m512i upper_halves(Vec low, Vec high) {
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                    23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                    45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(_mm512_castps_si512(low), _mm512_load_si512(kOdd),
                                   _mm512_castps_si512(high));
}

// The parts of 32 floats, each as 32 bf16.
TRANCHE_INLINE void parts_of(Vec low, Vec high, __m512i (&part)[3]) {
  Vec first[3], second[3];
  parts_of(low, first);
  parts_of(high, second);
#pragma GCC unroll 3
  for (int p = 0; p < 3; ++p) part[p] = upper_halves(first[p], second[p]);
}

}  // namespace tranche::cpu::TRANCHE_ISA
