// The experts on the CPU, compiled once per instruction set: chooses the engine for the types at hand.
#include "moe/moe_experts_cpu.h"
#include "core/dispatch.h"
#include "core/isa.h"
#if defined(__AMX_BF16__)
#include "moe/moe_engine_amx_cpu.h"
#include "moe/moe_engine_packed_amx_cpu.h"
#include "moe/moe_engine_parts_amx_cpu.h"
#endif

namespace tranche::cpu::TRANCHE_ISA {
namespace {

template <class T>
struct ExpertsEngine {
#if defined(__AMX_BF16__)
  using type = PartsEngine;
#else
  using type = FmaEngine;
#endif
  using packed = PackedFmaEngine;
};
template <>
struct ExpertsEngine<double> {
  using type = F64Engine;
};
#if defined(__AMX_BF16__)
template <>
struct ExpertsEngine<bf16> {
  using type = AmxEngine;
  using packed = PackedAmxEngine;
};
#elif defined(__AVX512BF16__)
template <>
struct ExpertsEngine<bf16> {
  using type = DotEngine;
  using packed = PackedDotEngine;
};
#endif

// f(experts) for the types in use.
template <class F>
TRANCHE_INLINE auto with_experts(const MoeExpertsParams& p, const F& f) {
  return with_type<double, float, half, bf16>("moe_experts", p.type, [&](auto t) {
    using T = decltype(t);
    using Engine = typename ExpertsEngine<T>::type;
    if constexpr (!__is_same(T, double)) {
      if (p.bits) return f(Experts<typename ExpertsEngine<T>::packed, T, Packed>(p));
    }
    return p.up.scale ? f(Experts<Engine, T, int8_t>(p)) : f(Experts<Engine, T, T>(p));
  });
}

}  // namespace

size_t moe_experts_workspace(const MoeExpertsParams& p) {
  return with_experts(p, [](const auto& experts) { return size_t(experts.bytes()); });
}

void moe_experts(const MoeExpertsParams& p) {
  with_experts(p, [&](const auto& experts) { experts.run(); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, moe_experts_workspace, MoeExpertsParams)
TRANCHE_CPU_ENTRY(void, moe_experts, MoeExpertsParams)
