// tranche::moe_plan: schema, checks, allocation.
#include "moe/moe_plan.h"

#include "moe/moe_glue.h"

namespace tranche {
namespace {

std::tuple<Tensor, Tensor> moe_plan(const Tensor& topk_ids, int64_t num_experts) {
  const TensorChecks check("moe_plan");
  check.dim("topk_ids", topk_ids, 2, "[T, K]");
  check.dtype("topk_ids", topk_ids, {ScalarType::Int});
  check.contiguous("topk_ids", topk_ids);
  check_expert_count(check, num_experts);
  check.that(topk_ids.numel() <= INT32_MAX, "at most 2^31 - 1 ids", topk_ids.numel(), "Split the batch.");
  if (checks_values()) check_ids(check, topk_ids, num_experts);
  const Plan plan = make_plan(topk_ids, num_experts);
  return {plan.offsets, plan.slots};
}

REGISTER_OP(moe_plan, "(Tensor topk_ids, SymInt num_experts) -> (Tensor offsets, Tensor slots)")

}  // namespace
}  // namespace tranche
