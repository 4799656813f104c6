// The experts on the CPU, compiled once per instruction set: chooses the engine for the types at hand.
#include "moe/moe_experts_cpu.h"
#include "core/dispatch.h"
#include "core/isa.h"
#if defined(__AMX_BF16__)
#include "moe/moe_engine_amx_cpu.h"
#include "moe/moe_engine_packed_amx_cpu.h"
#include "moe/moe_engine_split_amx_cpu.h"
#endif

namespace tranche::cpu::TRANCHE_ISA {
namespace {

// `type` for weights of the columns' type, `integers` for int8, `packed` for packed ones.
template <class T>
struct ExpertsEngine {
  using type = FmaEngine;
  using integers = FmaEngine;
  using packed = PackedFmaEngine;
};
template <>
struct ExpertsEngine<double> {
  using type = F64Engine;
  using integers = F64Engine;
};
#if defined(__AMX_BF16__)
template <>
struct ExpertsEngine<float> {
  using type = SplitAmxEngine;
  using integers = FmaEngine;
  using packed = PackedFmaEngine;
};
template <>
struct ExpertsEngine<bf16> {
  using type = AmxEngine;
  using integers = AmxEngine;
  using packed = PackedAmxEngine;
};
#elif defined(__AVX512BF16__)
template <>
struct ExpertsEngine<bf16> {
  using type = DotEngine;
  using integers = DotEngine;
  using packed = PackedDotEngine;
};
#endif

// f(experts) for the types in use.
template <class F>
TRANCHE_INLINE auto with_experts(const MoeExpertsParams& p, const F& f) {
  return with_type<double, float, half, bf16>("moe_experts", p.type, [&](auto t) {
    using T = decltype(t);
    using Engines = ExpertsEngine<T>;
    if constexpr (!__is_same(T, double)) {
      if (p.bits) return f(Experts<typename Engines::packed, T, Packed>(p));
    }
    if (p.up.scale) return f(Experts<typename Engines::integers, T, int8_t>(p));
    return f(Experts<typename Engines::type, T, T>(p));
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
