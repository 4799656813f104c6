#include "moe/moe_route.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {

size_t moe_route_workspace(const MoeRouteParams&) { return 0; }

void moe_route(const MoeRouteParams& p, void* stream) {
  const LaunchShape shape{dim3(unsigned(p.tokens)), dim3(MoeChoiceTraits::kThreads)};
  with_type<float, half, bf16>("moe_route", p.type, [&](auto t) {
    launch("moe_route", moe_route_kernel<decltype(t)>, shape, stream, p);
  });
}

}  // namespace tranche::cuda
