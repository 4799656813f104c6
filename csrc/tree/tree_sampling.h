// The rule by which a token is drawn from a row of logits, for the CPU and the GPU alike.
//
// A token's probability is kept as an integer weight, so sums do not depend on their order, and nothing that
// follows (where top-k and top-p cut, which token is drawn) depends on threads, blocks or the device:
//   y = (x - max) * (log2(e) / temperature)   in float, 0 where x equals max
//   weight = floor(2^y * 2^39)                for y > -39; other tokens, NaN and -inf among them, have none
// A token that is 2^39 times less likely than the likeliest is never drawn.
//
// The order of tokens, for top-k and top-p, is by falling logit and then by rising id: rank() below.
#pragma once

#include <cstdint>

#include "core/numeric.h"
#include "core/philox.h"

namespace tranche {

constexpr int kWeightBits = 39;
constexpr float kLeastExponent = -float(kWeightBits);  // y of a live token is above this
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kMaxVocab = 1 << 24;  // weights of as many tokens add up in 64 bits

// Tokens are first told apart by intervals of y, of 1/16 octave each: a partition that respects rank(), in
// which the one interval that a cut falls into holds few tokens.
constexpr float kBinsPerOctave = 16.0f;
constexpr int kBins = kWeightBits * int(kBinsPerOctave);

// Floats as integers of the same order; NaN as -inf, and -0 as +0.
TRANCHE_HD uint32_t ordered_bits(float x) {
  if (!(x == x)) x = bits_float(0xff800000u);
  const uint32_t u = float_bits(x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

TRANCHE_HD float from_ordered_bits(uint32_t ordered) {
  return bits_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// A token's place in the order of its row: smaller comes first, and no two are equal.
TRANCHE_HD uint64_t rank(float x, uint32_t token) { return uint64_t(~ordered_bits(x)) << 32 | token; }

// One rounding each, never contracted: compilers for the GPU would.
TRANCHE_HD float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

TRANCHE_HD float rounded_fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// As a scalar what simd.h's vexp2<6> is for vectors: the same polynomial and so the same bits wherever fma is
// one rounding. For -126 <= x <= 0.
TRANCHE_HD float exp2_of(float x) {
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in its low bits
  const float f = x - (shifted - 12582912.0f);
  float p = 0.00015353361959569156f;
  p = rounded_fma(p, f, 0.0013398873852565885f);
  p = rounded_fma(p, f, 0.00961843691766262f);
  p = rounded_fma(p, f, 0.055503323674201965f);
  p = rounded_fma(p, f, 0.24022647738456726f);
  p = rounded_fma(p, f, 0.6931471824645996f);
  p = rounded_fma(p, f, 1.0f);
  return bits_float(float_bits(p) + (float_bits(shifted) << 23));
}

// The row that a token is drawn from: its largest logit, and log2(e) / temperature.
struct RowScale {
  float max, factor;
};

TRANCHE_HD float exponent_of(float x, RowScale row) {
  return x == row.max ? 0.0f : rounded_product(x - row.max, row.factor);
}

TRANCHE_HD bool is_live(float y) { return y > kLeastExponent; }

// 2^e * 2^39 as an integer, for e = exp2 of a live exponent or 0.
TRANCHE_HD uint64_t fixed_point(float e) {
  const uint32_t bits = float_bits(e);
  const uint32_t shift = 127u - (bits >> 23);
  return (uint64_t((bits & 0x7fffffu) | 0x800000u) << (kWeightBits - 23)) >> (shift < 63u ? shift : 63u);
}

TRANCHE_HD uint64_t weight_of(float y) { return is_live(y) ? fixed_point(exp2_of(y)) : 0; }

TRANCHE_HD int bin_of(float live_y) { return int(-live_y * kBinsPerOctave); }

// How much of the total weight top-p keeps: tokens are kept, in order, while the sum before them is below it.
TRANCHE_HD uint64_t top_p_limit(float top_p, uint64_t total) {
  if (!(top_p < 1.0f)) return total;
  if (top_p <= 0.0f) return 1;  // the first token always stays
  const double part = double(top_p) * double(total);
  const uint64_t floor = uint64_t(part);
  const uint64_t limit = floor + (double(floor) < part ? 1 : 0);
  return limit < 1 ? 1 : (limit < total ? limit : total);
}

// What one sequence asks of its draws.
struct Sampling {
  float temperature, top_p;
  int32_t top_k;

  TRANCHE_HD bool greedy() const { return !(temperature > 0.0f); }
  TRANCHE_HD bool cuts_count(int32_t vocab) const { return top_k > 0 && top_k < vocab; }
  TRANCHE_HD bool cuts_mass() const { return top_p < 1.0f; }
};

}  // namespace tranche
