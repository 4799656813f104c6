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

// x Phi(x) = max(x, 0) + n Phi(n) with n = -|x|, and Phi(n) = exp(-n^2 / 2) t P(t) with t = 1 / (1 - 0.3 n):
// no cancellation on either side. P is fitted on [-14, 0] to a relative 3e-8 (1 + n^2 / 4); what n^2 loses by
// rounding grows alike.
TRANCHE_INLINE Vec vgelu(Vec x) {
  constexpr float kCoefficients[] = {0.0364240404f, -0.159974556f, 0.210426664f, -0.0566769797f,
                                     0.129677235f,  0.0997406935f, 0.120751232f, 0.119631687f};
  const Vec n = vmax(vset(-14.0f), vsub(vset(0.0f), vabs(x)));  // below it the product is 0
  const Vec t = vdiv(vset(1.0f), vfma(n, vset(-0.3f), vset(1.0f)));
  Vec p = vset(kCoefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < int(sizeof kCoefficients / sizeof *kCoefficients); ++i) {
    p = vfma(p, t, vset(kCoefficients[i]));
  }
  const Vec decay = vexp2<5>(vmul(vmul(n, vset(0.5f * kNegativeLog2e)), n));
  return vfma(vmul(n, t), vmul(p, decay), vmax(vset(0.0f), x));
}

TRANCHE_INLINE Vec vrelu(Vec x) { return vselect(vlt(x, vset(0.0f)), vset(0.0f), x); }

// NaN stays.
template <class A>
TRANCHE_INLINE A hardsigmoid(A x) {
  const A shifted = x + A(3);
  return (shifted < A(0) ? A(0) : shifted > A(6) ? A(6) : shifted) / A(6);
}

}  // namespace tranche::cpu::TRANCHE_ISA
