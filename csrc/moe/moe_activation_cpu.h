// Activations of the experts on the CPU: vectors of float, and double.
#pragma once

#include "core/activation_cpu.h"
#include "core/simd.h"
#include "moe/moe_experts.h"

namespace tranche::cpu::TRANCHE_ISA {

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

// h = act(gate) * up, or act(up) without gate.
template <Activation kActivation>
TRANCHE_INLINE void activate_with(const float* gate, const float* up, float* h, int n) {
  for (int i = 0; i < n; i += kWidth) {
    const Vec x = vload((gate ? gate : up) + i);
    Vec y;
    if constexpr (kActivation == Activation::silu) {
      y = vsilu(x);
    } else if constexpr (kActivation == Activation::gelu) {
      y = vgelu(x);
    } else {
      y = vrelu(x);
    }
    vstore(h + i, gate ? vmul(y, vload(up + i)) : y);
  }
}

// n is a multiple of 16.
TRANCHE_INLINE void activate(Activation activation, const float* gate, const float* up, float* h, int n) {
  switch (activation) {
    case Activation::silu:
      return activate_with<Activation::silu>(gate, up, h, n);
    case Activation::gelu:
      return activate_with<Activation::gelu>(gate, up, h, n);
    case Activation::relu:
      return activate_with<Activation::relu>(gate, up, h, n);
  }
}

TRANCHE_INLINE void activate(Activation activation, const double* gate, const double* up, double* h, int n) {
  for (int i = 0; i < n; ++i) {
    const double x = gate ? gate[i] : up[i];
    const double y = activation == Activation::silu   ? x / (1.0 + __builtin_exp(-x))
                     : activation == Activation::gelu ? 0.5 * x * __builtin_erfc(-x * 0.70710678118654752440)
                                                      : (x < 0.0 ? 0.0 : x);
    h[i] = gate ? y * up[i] : y;
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA
