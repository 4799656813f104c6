// Activations of the experts on the CPU: vectors of float, and double.
#pragma once

#include "core/activation_cpu.h"
#include "moe/moe_experts.h"

namespace tranche::cpu::TRANCHE_ISA {

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
