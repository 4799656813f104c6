#include "moe/moe_plan.cuh"

namespace tranche::cuda {

void moe_plan(const MoePlanParams& p, void* stream) {
  launch("moe_plan", moe_plan_kernel, {dim3(unsigned(p.experts + 1)), dim3(MoePlanTraits::kThreads)}, stream,
         p);
}

}  // namespace tranche::cuda
