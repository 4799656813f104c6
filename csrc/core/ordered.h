// Floats as unsigned integers in the same order, so that (score, lower index) is one number to compare.
#pragma once

#include "core/numeric.h"

namespace tranche {

// Ascending with x; -0 and 0 are equal, and NaN is -inf. Never 0.
TRANCHE_HD uint32_t ordered_bits(float x) {
  const float plain = x == x ? x + 0.0f : bits_float(0xff800000u);  // -0 + 0 is 0
  const uint32_t u = float_bits(plain);
  return (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
}

TRANCHE_HD uint64_t ordered_bits(double x) {
  const double plain = x == x ? x + 0.0 : -__builtin_inf();
  uint64_t u;
  memcpy(&u, &plain, sizeof u);
  return (u >> 63) != 0 ? ~u : u | uint64_t(1) << 63;
}

// The float that ordered_bits came from.
TRANCHE_HD float float_of_ordered(uint32_t u) {
  return bits_float((u & 0x80000000u) != 0 ? u & 0x7fffffffu : ~u);
}

}  // namespace tranche
