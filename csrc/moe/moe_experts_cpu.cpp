// The experts on the CPU, compiled once per instruction set: chooses the engine for the types at hand.
#include "moe/moe_experts_cpu.h"
#include "core/isa.h"
#if defined(__AMX_BF16__)
#include "moe/moe_engine_amx_cpu.h"
#endif

namespace tranche::cpu::TRANCHE_ISA {
namespace {

#if defined(__AMX_BF16__)
using Bf16Engine = AmxEngine;
#elif defined(__AVX512BF16__)
using Bf16Engine = DotEngine;
#else
using Bf16Engine = FmaEngine;
#endif

template <class Engine, class T, class F>
TRANCHE_INLINE void with_weights(const MoeExpertsParams& p, const F& f) {
  if (p.up.scale) {
    f(Experts<Engine, T, int8_t>(p));
  } else {
    f(Experts<Engine, T, T>(p));
  }
}

// f(experts) for the types in use; the op has refused all others.
template <class F>
TRANCHE_INLINE void with_experts(const MoeExpertsParams& p, const F& f) {
  switch (p.type) {
    case DType::f64:
      return with_weights<F64Engine, double>(p, f);
    case DType::f32:
      return with_weights<FmaEngine, float>(p, f);
    case DType::f16:
      return with_weights<FmaEngine, half>(p, f);
    case DType::bf16:
      return with_weights<Bf16Engine, bf16>(p, f);
    default:
      return;
  }
}

}  // namespace

size_t moe_experts_workspace(const MoeExpertsParams& p) {
  size_t bytes = 0;
  with_experts(p, [&](const auto& experts) { bytes = size_t(experts.bytes()); });
  return bytes;
}

void moe_experts(const MoeExpertsParams& p) {
  with_experts(p, [&](const auto& experts) { experts.run(); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, moe_experts_workspace, MoeExpertsParams)
TRANCHE_CPU_ENTRY(void, moe_experts, MoeExpertsParams)
