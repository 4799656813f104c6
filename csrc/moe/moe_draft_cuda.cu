#include "moe/moe_draft.cuh"

namespace tranche::cuda {

size_t moe_draft_workspace(const MoeDraftParams&) { return 0; }

void moe_draft(const MoeDraftParams& p, void* stream) {
  const LaunchShape shape{dim3(unsigned(p.tokens)), dim3(MoeChoiceTraits::kThreads)};
  switch (p.type) {
    case DType::f32:
      return launch("moe_draft", moe_draft_kernel<float>, shape, stream, p);
    case DType::f16:
      return launch("moe_draft", moe_draft_kernel<half>, shape, stream, p);
    case DType::bf16:
      return launch("moe_draft", moe_draft_kernel<bf16>, shape, stream, p);
    default:
      throw std::runtime_error("tranche: moe_draft: expected float32, float16 or bfloat16");
  }
}

}  // namespace tranche::cuda
