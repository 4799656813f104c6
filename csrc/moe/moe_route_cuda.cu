#include "moe/moe_route.cuh"

namespace tranche::cuda {

size_t moe_route_workspace(const MoeRouteParams&) { return 0; }

void moe_route(const MoeRouteParams& p, void* stream) {
  const LaunchShape shape{dim3(unsigned(p.tokens)), dim3(MoeChoiceTraits::kThreads)};
  switch (p.type) {
    case DType::f32:
      return launch("moe_route", moe_route_kernel<float>, shape, stream, p);
    case DType::f16:
      return launch("moe_route", moe_route_kernel<half>, shape, stream, p);
    case DType::bf16:
      return launch("moe_route", moe_route_kernel<bf16>, shape, stream, p);
    default:
      throw std::runtime_error("tranche: moe_route: expected float32, float16 or bfloat16");
  }
}

}  // namespace tranche::cuda
