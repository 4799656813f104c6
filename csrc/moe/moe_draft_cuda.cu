#include "moe/moe_draft.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {
namespace {

template <class T, int kColumnTiles>
void run_up(const MoeDraftParams& p, void* stream) {
  using Traits = MoeExpertsTraits;
  const int features = p.experts_of.gate.data ? Traits::kRows / 2 : Traits::kRows;
  const int blocks = gate_blocks(p) + (p.experts_of.inner + features - 1) / features;
  const LaunchShape shape{dim3(unsigned(blocks), 2), dim3(Traits::kThreads),
                          Traits::kPartialFloats<8 * kColumnTiles> * sizeof(float)};
  launch("moe_draft_up", moe_draft_up_kernel<T, kColumnTiles>, shape, stream, p);
}

template <class T>
void run(const MoeDraftParams& p, void* stream) {
  if (p.variant == DraftVariant::topk) {
    const LaunchShape shape{dim3(unsigned(p.tokens)), dim3(MoeChoiceTraits::kThreads)};
    launch("moe_draft_gate", moe_draft_gate_kernel<T>, shape, stream, p);
    return moe_experts_after(p.experts_of, stream);
  }
  if (few_columns(p.experts_of)) {
    run_up<T, 2>(p, stream);
  } else {
    run_up<T, 8>(p, stream);
  }
  moe_experts_down(p.experts_of, stream);
}

}  // namespace

size_t moe_draft_workspace(const MoeDraftParams&) { return 0; }

void moe_draft(const MoeDraftParams& p, void* stream) {
  with_type<float, half, bf16>("moe_draft", p.type, [&](auto t) { run<decltype(t)>(p, stream); });
}

}  // namespace tranche::cuda
