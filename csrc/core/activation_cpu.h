// Activation functions for the CPU kernels of every family, most on vectors of float.
#pragma once

#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr float kNegativeLog2e = -1.4426950408889634f;

// 2^x with x cut at 126, so that 1 + 2^x is finite; NaN stays.
TRANCHE_INLINE Vec vexp2_bounded(Vec x) { return vexp2<6>(vselect(vlt(vset(126.0f), x), vset(126.0f), x)); }

TRANCHE_INLINE Vec vsilu(Vec x) {
  return vdiv(x, vadd(vset(1.0f), vexp2_bounded(vmul(x, vset(kNegativeLog2e)))));
}

// erfc(|z|) = exp(-z^2) t P(t) with t = 1 / (1 + z / 2), P fitted on all of z >= 0 to a relative 1e-8.
TRANCHE_INLINE Vec verfc_of_magnitude(Vec magnitude) {
  constexpr float kCoefficients[] = {0.0442498177f, -0.240022361f,  0.504976511f,  -0.468300402f,
                                     0.141680792f,  -0.0633874089f, 0.0945628732f, 0.175157905f,
                                     0.24689357f,   0.282093972f,   0.282094777f};
  const Vec t = vdiv(vset(1.0f), vfma(magnitude, vset(0.5f), vset(1.0f)));
  Vec p = vset(kCoefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < int(sizeof kCoefficients / sizeof *kCoefficients); ++i)
    p = vfma(p, t, vset(kCoefficients[i]));
  const Vec decay = vexp2<6>(vmul(vmul(magnitude, magnitude), vset(kNegativeLog2e)));
  return vmul(vmul(decay, t), p);
}

// x / 2 erfc(-x / sqrt 2): without cancellation on both sides.
TRANCHE_INLINE Vec vgelu(Vec x) {
  const Vec tail = verfc_of_magnitude(vabs(vmul(x, vset(0.70710678118654752f))));
  const Vec factor = vselect(vlt(x, vset(0.0f)), tail, vsub(vset(2.0f), tail));
  // the tail is 0 long before x is -inf, where 0 * inf would be NaN
  const Vec lowest = vset(-3.0e38f);
  const Vec bounded = vselect(vlt(x, lowest), lowest, x);
  return vmul(vmul(bounded, vset(0.5f)), factor);
}

TRANCHE_INLINE Vec vrelu(Vec x) { return vselect(vlt(x, vset(0.0f)), vset(0.0f), x); }

// NaN stays.
template <class A>
TRANCHE_INLINE A hardsigmoid(A x) {
  const A shifted = x + A(3);
  return (shifted < A(0) ? A(0) : shifted > A(6) ? A(6) : shifted) / A(6);
}

}  // namespace tranche::cpu::TRANCHE_ISA
