// tree_attention on the CPU, compiled once per instruction set: chooses the kernel for the types at hand.
#include "tree/tree_attention_cpu.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "tree/tree_attention_cpu_f64.h"
#include "tree/tree_attention_cpu_fma.h"
#if defined(__AMX_BF16__)
#include "tree/tree_attention_cpu_amx.h"
#elif defined(__AVX512BF16__)
#include "tree/tree_attention_cpu_dot.h"
#endif

namespace tranche::cpu::TRANCHE_ISA {
namespace {

#if defined(__AMX_BF16__)
template <class Q, class KV>
using Kernel = AmxKernel<Q, KV>;
#else
template <class Q, class KV>
struct Choice {
  using Kernel = FmaKernel<Q, KV>;
};
#if defined(__AVX512BF16__)
template <class KV>
struct Choice<bf16, KV> {
  using Kernel = DotKernel<KV>;
};
#endif
template <class Q, class KV>
using Kernel = typename Choice<Q, KV>::Kernel;
#endif

// f(kernel tag) for the types in use.
template <class K>
struct Tag {
  using type = K;
};
template <class F>
TRANCHE_INLINE auto with_kernel(const TreeAttentionParams& p, const F& f) {
  return with_type<float, half, bf16>("tree_attention", p.q_type, [&](auto t) {
    using T = decltype(t);
    return p.kv_type == DType::e4m3 ? f(Tag<Kernel<T, e4m3>>()) : f(Tag<Kernel<T, T>>());
  });
}

}  // namespace

size_t tree_attention_workspace(const TreeAttentionParams& p) {
  if (p.q_type == DType::f64) return workspace_bytes_f64(p);
  return with_kernel(p, [&](auto tag) { return workspace_bytes<typename decltype(tag)::type>(p); });
}

void tree_attention(const TreeAttentionParams& p) {
  if (p.q_type == DType::f64) return run_f64(p);
  with_kernel(p, [&](auto tag) { run<typename decltype(tag)::type>(p); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, tree_attention_workspace, TreeAttentionParams)
TRANCHE_CPU_ENTRY(void, tree_attention, TreeAttentionParams)
