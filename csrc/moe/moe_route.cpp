// tranche::moe_route: schema, checks, allocation.
#include "moe/moe_route.h"

#include "moe/moe_glue.h"

namespace tranche {
namespace {

void check_groups(const TensorChecks& check, int64_t experts, int64_t top_k, int64_t groups,
                  int64_t top_groups) {
  check.that(groups >= 1 && experts % groups == 0, concat("groups that divide the ", experts, " experts"),
             groups, "Groups are runs of equal length.");
  check.that(top_groups >= 1 && top_groups <= groups, concat("top_groups in [1, ", groups, "]"), top_groups,
             "Keep at least one group and at most all.");
  const int64_t inside = top_groups * (experts / groups);
  check.that(top_k <= inside, concat("top_k <= ", inside, ", the experts in the kept groups"), top_k,
             "Keep more groups.");
}

std::tuple<Tensor, Tensor> moe_route(const Tensor& x, const Tensor& weight, int64_t top_k, int64_t score,
                                     bool renormalize, const std::optional<Tensor>& bias, int64_t groups,
                                     int64_t top_groups, double scale,
                                     const std::optional<Tensor>& rms_weight, double eps) {
  const TensorChecks check("moe_route");
  check_activations(check, "x", x);
  check_router(check, "weight", weight, x);
  const int64_t tokens = x.size(0), experts = weight.size(0);
  check_expert_count(check, experts);
  check_top_k(check, top_k, experts);
  check_groups(check, experts, top_k, groups, top_groups);
  check.that(x.size(1) >= 1, "x.size(1) >= 1", "0", "A router needs features.");
  check.that(score >= 0 && score <= 2, "score in {0: softmax, 1: sigmoid, 2: relu_rms}", score,
             "Name one of these.");
  check.that(std::isfinite(scale), "a finite scale", scale, "Leave it out for 1.");
  check.that(std::isfinite(eps) && eps >= 0, "a finite eps >= 0", eps, "Leave it out for 1e-6.");
  if (bias) check.exactly("bias", *bias, ScalarType::Float, {experts}, "[E]", "weight", weight);
  if (rms_weight)
    check.exactly("rms_weight", *rms_weight, ScalarType::Float, {experts}, "[E]", "weight", weight);
  const bool relu_rms = score == int64_t(RouteScore::relu_rms);
  check.that(!rms_weight || relu_rms, "no rms_weight but with score relu_rms", "one", "Leave it out.");

  Tensor weights = empty_on(x, {tokens, top_k}, weights_type(x));
  Tensor ids = empty_on(x, {tokens, top_k}, ScalarType::Int);
  if (tokens == 0) return {weights, ids};

  MoeRouteParams params{};
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.bias = data<float>(bias);
  params.rms_weight = data<float>(rms_weight);
  params.weights = weights.mutable_data_ptr();
  params.ids = mutable_data<int32_t>(ids);
  params.x_stride = x.stride(0);
  params.weight_stride = weight.stride(0);
  params.tokens = int32_t(tokens);
  params.hidden = int32_t(x.size(1));
  params.experts = int32_t(experts);
  params.top_k = int32_t(top_k);
  params.groups = int32_t(groups);
  params.top_groups = int32_t(top_groups);
  params.score = RouteScore(score);
  params.renormalize = renormalize;
  params.scale = float(scale);
  params.eps = float(eps);
  params.type = dtype_of_tensor(x);
  const Tensor workspace = empty_on(x, {int64_t(KERNEL(moe_route_workspace)(params))}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  RUN_KERNEL(moe_route, params, x, weight, bias, rms_weight, weights, ids, workspace);
  return {weights, ids};
}

REGISTER_OP(moe_route,
            "(Tensor x, Tensor weight, SymInt top_k, int score=0, bool renormalize=True, Tensor? bias=None, "
            "SymInt groups=1, SymInt top_groups=1, float scale=1.0, Tensor? rms_weight=None, float eps=1e-6) "
            "-> (Tensor weights, Tensor ids)")

}  // namespace
}  // namespace tranche
