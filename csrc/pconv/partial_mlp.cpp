// tranche::partial_mlp: schema, checks, allocation.
#include "pconv/partial_mlp.h"

#include "core/torch_glue.h"

namespace tranche {
namespace {

// [rows, columns], or the weight of a 1x1 convolution, without gaps.
void check_matrix(const TensorChecks& check, Phrase name, const Tensor& w, int64_t rows, int64_t columns,
                  const char* shape, const Tensor& x) {
  check.dtype(name, w, {x.scalar_type()});
  const bool is_matrix = w.dim() == 2 || (w.dim() == 4 && w.size(2) == 1 && w.size(3) == 1);
  check.that(is_matrix && w.size(0) == rows && w.size(1) == columns,
             concat(name, " of shape ", shape, " = [", rows, ", ", columns, "], or a 1x1 convolution's"),
             shape_text(w), "Sizes follow from x and b1.");
  check.same_device(name, w, "x", x);
}

Tensor partial_mlp(const Tensor& x, const Tensor& conv_weight, const Tensor& w1, const Tensor& b1,
                   const Tensor& w2, const Tensor& b2, int64_t activation, const std::optional<Tensor>& gate,
                   const std::optional<Tensor>& spatial_weight, const std::optional<Tensor>& spatial_bias,
                   bool residual) {
  const TensorChecks check("partial_mlp");
  check.dim("x", x, 4, "[B, C, H, W]");
#if defined(TRANCHE_BACKEND_CPU)
  check.dtype("x", x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
#else
  check.dtype("x", x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
#endif
  const ScalarType type = x.scalar_type();
  const int64_t channels = x.size(1), hidden = b1.dim() == 1 ? b1.size(0) : 0;
  for (int i = 0; i < 4; ++i) {
    check.that(x.size(i) <= INT32_MAX, "sizes of x below 2^31", shape_text(x), "Cut the input in pieces.");
  }
  check.dim("conv_weight", conv_weight, 4, "[c, c, 3, 3]");
  const int64_t convolved = conv_weight.size(0);
  check.that(convolved > 0 && conv_weight.size(1) == convolved && conv_weight.size(2) == 3 &&
                 conv_weight.size(3) == 3,
             "conv_weight of shape [c, c, 3, 3]", shape_text(conv_weight), "Give a 3x3 convolution.");
  check.that(convolved <= channels, concat("conv_weight.size(0) <= x.size(1) (", channels, ")"), convolved,
             "The convolved channels are the first of x.");
  check.dtype("conv_weight", conv_weight, {type});
  check.same_device("conv_weight", conv_weight, "x", x);
  check.dim("b1", b1, 1, "[M]");
  check.that(hidden > 0 && hidden <= INT32_MAX, "b1 with elements", shape_text(b1), "M is at least 1.");
  check.exactly("b1", b1, type, {hidden}, "[M]", "x", x);
  check_matrix(check, "w1", w1, hidden, channels, "[M, C]", x);
  check_matrix(check, "w2", w2, channels, hidden, "[C, M]", x);
  check.exactly("b2", b2, type, {channels}, "[C]", "x", x);
  check.that(activation == 0 || activation == 1, "activation 0 (relu) or 1 (gelu)", activation,
             "Other activations are not fused.");
  if (gate) {
    check.exactly("gate", *gate, type, {x.size(0), channels - convolved}, "[B, C - c]", "x", x);
  }
  check.that(spatial_weight || !spatial_bias, "spatial_weight beside spatial_bias", "spatial_bias alone",
             "Give both or neither.");
  if (spatial_weight) check.exactly("spatial_weight", *spatial_weight, type, {hidden}, "[M]", "b1", x);
  if (spatial_bias) check.exactly("spatial_bias", *spatial_bias, type, {1}, "[1]", "x", x);

  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0) return y;
  const Tensor conv_dense = torch::stable::contiguous(conv_weight);
  const Tensor w1_dense = torch::stable::contiguous(w1), w2_dense = torch::stable::contiguous(w2);
  PartialMlpParams p{};
  p.x = x.const_data_ptr();
  p.conv_weight = conv_dense.const_data_ptr();
  p.w1 = w1_dense.const_data_ptr();
  p.b1 = b1.const_data_ptr();
  p.w2 = w2_dense.const_data_ptr();
  p.b2 = b2.const_data_ptr();
  p.gate = gate ? gate->const_data_ptr() : nullptr;
  p.spatial_weight = spatial_weight ? spatial_weight->const_data_ptr() : nullptr;
  p.spatial_bias = spatial_bias ? spatial_bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  for (int i = 0; i < 4; ++i) {
    p.x_stride[i] = x.stride(i);
    p.y_stride[i] = y.stride(i);
  }
  p.batch = int32_t(x.size(0));
  p.channels = int32_t(channels);
  p.height = x.size(2);
  p.width = x.size(3);
  p.convolved = int32_t(convolved);
  p.hidden = int32_t(hidden);
  p.activation = PartialMlpParams::Activation(activation);
  p.residual = residual;
  p.type = dtype_of_tensor(x);
  const Tensor workspace = empty_on(x, {int64_t(KERNEL(partial_mlp_workspace)(p))}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  RUN_KERNEL(partial_mlp, p, x, conv_dense, w1_dense, b1, w2_dense, b2, gate, spatial_weight, spatial_bias, y,
             workspace);
  return y;
}

REGISTER_OP(
    partial_mlp,
    "(Tensor x, Tensor conv_weight, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int activation=0, "
    "Tensor? gate=None, Tensor? spatial_weight=None, Tensor? spatial_bias=None, bool residual=True) -> "
    "Tensor")

}  // namespace
}  // namespace tranche
