#include "core/dispatch.h"
#include "moe/moe_experts.cuh"
#include "moe/moe_plan.h"

namespace tranche::cuda {
namespace {

using Traits = MoeExpertsTraits;

// f(kernels<T, W, kColumnTiles>) for the types in use.
template <class T, class W, int kColumnTiles>
struct Kernels {
  static constexpr size_t kPartial = Traits::kPartialFloats<8 * kColumnTiles> * sizeof(float);

  static void gate_up(const MoeExpertsParams& p, bool overlaps, void* stream) {
    const int features = p.gate.data ? Traits::kRows / 2 : Traits::kRows;
    const LaunchShape shape{dim3(unsigned((p.inner + features - 1) / features), unsigned(p.experts)),
                            dim3(Traits::kThreads), kPartial, overlaps};
    launch("moe_gate_up", moe_gate_up_kernel<T, W, kColumnTiles>, shape, stream, p);
  }

  static void down(const MoeExpertsParams& p, void* stream) {
    const unsigned row_blocks = unsigned((p.hidden + Traits::kRows - 1) / Traits::kRows);
    const unsigned token_blocks = unsigned((p.tokens + Traits::kTokens - 1) / Traits::kTokens);
    const size_t sums = size_t(p.outputs) * Traits::kTokens * Traits::kRows * sizeof(float);
    const LaunchShape shape{dim3(row_blocks, token_blocks), dim3(Traits::kThreads), kPartial + sums, true};
    launch("moe_down", moe_down_kernel<T, W, kColumnTiles>, shape, stream, p);
  }
};

template <class T, class F>
void with_weights(const MoeExpertsParams& p, const F& f) {
  const bool few = few_columns(p);
  if (p.bits) {
    if (few) return f(Kernels<T, Packed, 2>());
    return f(Kernels<T, Packed, 8>());
  }
  if (p.up.scale) {
    if (few) return f(Kernels<T, int8_t, 2>());
    return f(Kernels<T, int8_t, 8>());
  }
  if (few) return f(Kernels<T, T, 2>());
  return f(Kernels<T, T, 8>());
}

template <class F>
void with_kernels(const MoeExpertsParams& p, const F& f) {
  with_type<float, half, bf16>("moe_experts", p.type, [&](auto t) { with_weights<decltype(t)>(p, f); });
}

void run(const MoeExpertsParams& p, bool overlaps, void* stream) {
  const bool plan_first = p.ids && p.tokens * p.top_k > Traits::kListed;
  if (plan_first) {
    moe_plan({p.ids, made_offsets(p), made_slots(p), p.tokens * p.top_k, p.experts}, stream);
  }
  with_kernels(p, [&](auto kernels) {
    kernels.gate_up(p, overlaps && !plan_first, stream);
    kernels.down(p, stream);
  });
}

}  // namespace

size_t moe_experts_workspace(const MoeExpertsParams& p) {
  const int64_t plan = p.ids ? int64_t(p.experts) + 1 + int64_t(p.tokens) * p.top_k : 0;
  return size_t(h_bytes(p)) + size_t(plan) * sizeof(int32_t);
}

void moe_experts(const MoeExpertsParams& p, void* stream) { run(p, false, stream); }

void moe_experts_after(const MoeExpertsParams& p, void* stream) { run(p, true, stream); }

void moe_experts_down(const MoeExpertsParams& p, void* stream) {
  with_kernels(p, [&](auto kernels) { kernels.down(p, stream); });
}

}  // namespace tranche::cuda
