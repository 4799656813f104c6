// tranche::moe_experts: schema, checks, allocation.
#include "moe/moe_experts.h"

#include "moe/moe_glue.h"

namespace tranche {
namespace {

void check_plan(const TensorChecks& check, const Tensor& offsets, const Tensor& slots, const Tensor& ids,
                int64_t experts) {
  const HostValues<int32_t> bounds(offsets), listed(slots), chosen(ids);
  for (int64_t e = 0; e < experts; ++e) {
    check.in_range("offsets", e, bounds[e], e == 0 ? 0 : bounds[e - 1], ids.numel(),
                   "Offsets ascend from 0; make the plan with RoutingPlan.from_ids.");
    check.in_range("offsets", e + 1, bounds[e + 1], bounds[e], ids.numel(),
                   "Offsets ascend from 0; make the plan with RoutingPlan.from_ids.");
    for (int64_t i = bounds[e]; i < bounds[e + 1]; ++i) {
      check.in_range("slots", i, listed[i], 0, ids.numel() - 1, "A slot is t * K + k.");
      check.index(chosen[listed[i]] == e,
                  concat("slot ", listed[i], " in the plan of expert ", chosen[listed[i]]),
                  concat("expert ", e), "The plan belongs to other topk_ids; make it anew.");
    }
  }
}

Tensor moe_experts(const Tensor& x, const std::optional<Tensor>& w_gate, const Tensor& w_up,
                   const Tensor& w_down, const Tensor& topk_weights, const Tensor& topk_ids,
                   int64_t activation, const std::optional<Tensor>& w_gate_scale,
                   const std::optional<Tensor>& w_up_scale, const std::optional<Tensor>& w_down_scale,
                   const std::optional<Tensor>& offsets, const std::optional<Tensor>& slots,
                   std::optional<int64_t> bits, int64_t layout) {
  const TensorChecks check("moe_experts");
  check_activations(check, "x", x);
  const ExpertTensors weights{w_gate, w_up, w_down, w_gate_scale, w_up_scale, w_down_scale, bits, layout};
  weights.check(check, x);
  const int64_t tokens = x.size(0), experts = weights.experts();
  check.dim("topk_ids", topk_ids, 2, "[T, K]");
  const int64_t top_k = topk_ids.size(1);
  check.that(top_k <= kMaxExperts, concat("at most ", kMaxExperts, " choices of a token"), top_k,
             "A token has at most as many choices as there are experts.");
  check.exactly("topk_ids", topk_ids, ScalarType::Int, {tokens, top_k}, "[T, K]", "x", x);
  check.exactly("topk_weights", topk_weights, weights_type(x), {tokens, top_k}, "[T, K]", "topk_ids", x);
  check.that(activation >= 0 && activation <= 2, "activation in {0: silu, 1: gelu, 2: relu}", activation,
             "Name one of these.");
  check.that(offsets.has_value() == slots.has_value(), "offsets and slots together", "one of them",
             "A plan is both.");
  if (offsets) {
    check.exactly("offsets", *offsets, ScalarType::Int, {experts + 1}, "[E + 1]", "w_up", x);
    check.exactly("slots", *slots, ScalarType::Int, {tokens * top_k}, "[T * K]", "topk_ids", x);
  }

  Tensor out = empty_on(x, {tokens, x.size(1)}, x.scalar_type());
  if (out.numel() == 0) return out;
  if (checks_values()) {
    check_ids(check, topk_ids, experts);
    if (offsets) check_plan(check, *offsets, *slots, topk_ids, experts);
  }
  MoeExpertsParams params{};
  weights.set(params);
  const std::optional<Plan> plan = offsets ? Plan{*offsets, *slots} : plan_ahead(topk_ids, experts);
  if (plan) {
    params.offsets = data<int32_t>(plan->offsets);
    params.slots = data<int32_t>(plan->slots);
  } else {
    params.ids = data<int32_t>(topk_ids);
  }
  params.x = x.const_data_ptr();
  params.coefficients = topk_weights.const_data_ptr();
  params.out[0] = out.mutable_data_ptr();
  params.x_stride = x.stride(0);
  params.tokens = int32_t(tokens);
  params.hidden = int32_t(x.size(1));
  params.top_k = int32_t(top_k);
  params.outputs = 1;
  params.activation = Activation(activation);
  params.type = dtype_of_tensor(x);
  const Tensor workspace = empty_on(x, {int64_t(KERNEL(moe_experts_workspace)(params))}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  RUN_KERNEL(moe_experts, params, x, w_gate, w_up, w_down, w_gate_scale, w_up_scale, w_down_scale,
             topk_weights, topk_ids, tensor_of(plan, &Plan::offsets), tensor_of(plan, &Plan::slots), out,
             workspace);
  return out;
}

REGISTER_OP(
    moe_experts,
    "(Tensor x, Tensor? w_gate, Tensor w_up, Tensor w_down, Tensor topk_weights, Tensor topk_ids, "
    "int activation=0, Tensor? w_gate_scale=None, Tensor? w_up_scale=None, Tensor? w_down_scale=None, "
    "Tensor? offsets=None, Tensor? slots=None, int? bits=None, int layout=1) -> Tensor")

}  // namespace
}  // namespace tranche
