// tranche::moe_draft: schema, checks, allocation. The gate's kernel, then those of the experts.
#include "moe/moe_draft.h"

#include "moe/moe_glue.h"

namespace tranche {
namespace {

void check_variant(const TensorChecks& check, DraftVariant variant, const Tensor& router, int64_t experts,
                   int64_t top_k, bool contrast) {
  const bool star = variant == DraftVariant::star;
  check.equal("router.size(0)", router.size(0), star ? "2" : "E + 2", star ? 2 : experts + 2,
              star ? "Jakiro* has one row for each of its two experts."
                   : "The last two rows are those of the contrast.");
  check_top_k(check, top_k, experts);
  if (variant == DraftVariant::topk) {
    check.that(!contrast || top_k >= 2, "top_k >= 2 with contrast", top_k,
               "The contrast is between two experts.");
    return;
  }
  check.that(experts == 2 && top_k == 2, "two experts, both chosen",
             concat(experts, " experts, top_k ", top_k), "Other numbers are variant 'topk'.");
  check.that(!star || contrast, "both outputs of Jakiro*", "one", "Its outputs are a pair.");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_draft(const Tensor& x, const Tensor& router,
                                                     const std::optional<Tensor>& w_gate, const Tensor& w_up,
                                                     const Tensor& w_down, int64_t top_k, bool contrast,
                                                     const std::optional<Tensor>& residual, int64_t variant,
                                                     int64_t activation) {
  const TensorChecks check("moe_draft");
  check_activations(check, "x", x);
  const std::optional<Tensor> no_scale;
  const ExpertTensors weights{w_gate, w_up, w_down, no_scale, no_scale, no_scale};
  weights.check(check, x);
  check_router(check, "router", router, x);
  check.that(variant >= 0 && variant <= 2, "variant in {0: jakiro, 1: topk, 2: star}", variant,
             "Name one of these.");
  check.that(activation >= 0 && activation <= 2, "activation in {0: silu, 1: gelu, 2: relu}", activation,
             "Name one of these.");
  check_variant(check, DraftVariant(variant), router, weights.experts(), top_k, contrast);
  check_residual(check, residual, x);

  const int64_t tokens = x.size(0), outputs = contrast ? 2 : 1;
  Tensor first = empty_on(x, {tokens, x.size(1)}, x.scalar_type());
  Tensor second = empty_on(x, {contrast ? tokens : 0, x.size(1)}, x.scalar_type());
  Tensor coefficients = empty_on(x, {outputs, tokens, top_k}, weights_type(x));
  Tensor ids = empty_on(x, {tokens, top_k}, ScalarType::Int);
  check.that(x.size(1) >= 1, "x.size(1) >= 1", "0", "A router needs features.");
  if (tokens == 0) return {first, second, coefficients, ids};

  MoeDraftParams gate{};
  gate.x = x.const_data_ptr();
  gate.router = router.const_data_ptr();
  gate.coefficients = coefficients.mutable_data_ptr();
  gate.ids = mutable_data<int32_t>(ids);
  gate.x_stride = x.stride(0);
  gate.router_stride = router.stride(0);
  gate.tokens = int32_t(tokens);
  gate.hidden = int32_t(x.size(1));
  gate.experts = int32_t(weights.experts());
  gate.rows = int32_t(router.size(0));
  gate.top_k = int32_t(top_k);
  gate.outputs = int32_t(outputs);
  gate.variant = DraftVariant(variant);
  gate.type = dtype_of_tensor(x);
  const Tensor gate_workspace = empty_on(x, {int64_t(KERNEL(moe_draft_workspace)(gate))}, ScalarType::Byte);
  gate.workspace = gate_workspace.mutable_data_ptr();

  MoeExpertsParams params{};
  weights.set(params);
  params.x = gate.x;
  params.coefficients = coefficients.const_data_ptr();
  params.residual = residual ? residual->const_data_ptr() : nullptr;
  params.residual_stride = residual ? residual->stride(0) : 0;
  params.out[0] = first.mutable_data_ptr();
  params.out[1] = contrast ? second.mutable_data_ptr() : nullptr;
  params.x_stride = gate.x_stride;
  params.tokens = gate.tokens;
  params.hidden = gate.hidden;
  params.top_k = gate.top_k;
  params.outputs = gate.outputs;
  params.activation = Activation(activation);
  params.type = gate.type;
#if defined(TRANCHE_BACKEND_CPU)
  RUN_KERNEL(moe_draft, gate, x, router, coefficients, ids, gate_workspace);
  const Plan plan = make_plan(ids, weights.experts());
  params.offsets = data<int32_t>(plan.offsets);
  params.slots = data<int32_t>(plan.slots);
  const Tensor workspace = empty_on(x, {int64_t(KERNEL(moe_experts_workspace)(params))}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  RUN_KERNEL(moe_experts, params, x, w_gate, w_up, w_down, coefficients, plan.offsets, plan.slots, residual,
             first, second, workspace);
#else
  if (gate.variant == DraftVariant::topk) params.ids = gate.ids;
  const Tensor workspace = empty_on(x, {int64_t(KERNEL(moe_experts_workspace)(params))}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  gate.experts_of = params;
  RUN_KERNEL(moe_draft, gate, x, router, w_gate, w_up, w_down, coefficients, ids, residual, first, second,
             gate_workspace, workspace);
#endif
  return {first, second, coefficients, ids};
}

REGISTER_OP(moe_draft,
            "(Tensor x, Tensor router, Tensor? w_gate, Tensor w_up, Tensor w_down, SymInt top_k=2, "
            "bool contrast=False, Tensor? residual=None, int variant=0, int activation=0) "
            "-> (Tensor first, Tensor second, Tensor coefficients, Tensor ids)")

}  // namespace
}  // namespace tranche
