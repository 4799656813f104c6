// tranche::bits_int_linear and tranche::bits_linear: schemas, checks, allocation.
#include "bits/bits_linear.h"

#include "bits/packed_checks.h"

namespace tranche {
namespace {

// 128 * 128 * (2^17 - 1) still fits 32 bits; partial sums may wrap.
constexpr int64_t kMostIntegerInputs = (1 << 17) - 1;

void check_x(const TensorChecks& check, const Tensor& x, const Tensor& data, const PackedWeight& w,
             bool integers) {
  check.dim("x", x, 2, "[M, I]");
  check.same_device("data", data, "x", x);
  check.equal("x.size(-1)", x.size(1), "in_features", w.in_features, "Inputs meet the weight's columns.");
  check.last_contiguous("x", x);
  check.that(!integers || w.in_features <= kMostIntegerInputs,
             concat("at most ", kMostIntegerInputs, " inputs to sum in 32 bits"), w.in_features,
             "Split the inputs, or leave activation_bits out.");
}

void set_x(BitsLinearParams& params, const Tensor& x) {
  params.x = x.const_data_ptr();
  params.rows = x.size(0);
  params.x_stride = x.stride(0);
}

Tensor workspace_for(BitsLinearParams& params, const Tensor& like) {
  const Tensor workspace = empty_on(like, {KERNEL(bits_linear_workspace)(params)}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  return workspace;
}

Tensor bits_int_linear(const Tensor& x, const Tensor& data, int64_t out_features, int64_t in_features,
                       int64_t layout, int64_t bits) {
  const TensorChecks check("bits_int_linear");
  BitsLinearParams params{};
  params.w = packed_weight(check, data, out_features, in_features, layout, bits);
  check.dtype("x", x, {ScalarType::Char});
  check_x(check, x, data, params.w, true);
  Tensor out = empty_on(x, {x.size(0), out_features}, ScalarType::Int);
  if (out.numel() == 0) return out;
  if (in_features == 0) return torch::stable::zero_(out);
  set_x(params, x);
  params.out = out.mutable_data_ptr();
  params.groups = 1;
  params.kind = LinearKind::integers;
  const Tensor workspace = workspace_for(params, x);
  RUN_KERNEL(bits_linear, params, x, data, out, workspace);
  return out;
}

Tensor bits_linear(const Tensor& x, const Tensor& data, const Tensor& scale, int64_t out_features,
                   int64_t in_features, int64_t layout, int64_t bits, const std::optional<Tensor>& bias,
                   std::optional<int64_t> activation_bits) {
  const TensorChecks check("bits_linear");
  BitsLinearParams params{};
  params.w = packed_weight(check, data, out_features, in_features, layout, bits);
  params.groups = check_scale(check, scale, params.w, data);
  check.that(!activation_bits || *activation_bits == 8, "activation_bits None or 8",
             activation_bits ? *activation_bits : 0, "Activations are quantized to 8 bits, or not at all.");
  check.dtype("x", x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  check_x(check, x, data, params.w, activation_bits.has_value());
  if (bias) check.exactly("bias", *bias, ScalarType::Float, {out_features}, "[O]", "x", x);
  Tensor out = empty_on(x, {x.size(0), out_features}, x.scalar_type());
  if (out.numel() == 0) return out;
  set_x(params, x);
  params.scale = tranche::data<float>(scale);
  params.bias = tranche::data<float>(bias);
  params.out = out.mutable_data_ptr();
  params.kind = activation_bits ? LinearKind::quantized : LinearKind::weight_only;
  params.type = dtype_of_tensor(x);
  const Tensor workspace = workspace_for(params, x);
  RUN_KERNEL(bits_linear, params, x, data, scale, bias, out, workspace);
  return out;
}

REGISTER_OP(
    bits_int_linear,
    "(Tensor x, Tensor data, SymInt out_features, SymInt in_features, int layout, int bits) -> Tensor")
REGISTER_OP(bits_linear,
            "(Tensor x, Tensor data, Tensor scale, SymInt out_features, SymInt in_features, int layout, "
            "int bits, Tensor? bias=None, int? activation_bits=None) -> Tensor")

}  // namespace
}  // namespace tranche
