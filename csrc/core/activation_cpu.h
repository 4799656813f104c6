// SiLU on vectors of float, for the CPU kernels of every family.
#pragma once

#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr float kNegativeLog2e = -1.4426950408889634f;

// 2^x with x cut at 126, so that 1 + 2^x is finite; NaN stays.
TRANCHE_INLINE Vec vexp2_bounded(Vec x) { return vexp2<6>(vselect(vlt(vset(126.0f), x), vset(126.0f), x)); }

TRANCHE_INLINE Vec vsilu(Vec x) {
  return vdiv(x, vadd(vset(1.0f), vexp2_bounded(vmul(x, vset(kNegativeLog2e)))));
}

}  // namespace tranche::cpu::TRANCHE_ISA
