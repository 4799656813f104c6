// tranche::partial_mlp and partial_mlp_pack: schemas, checks, allocation.
#include "pconv/partial_mlp.h"

#include "pconv/image_glue.h"
#include "pconv/packed.h"

namespace tranche {
namespace {

// [rows, columns], or the weight of a 1x1 convolution, without gaps.
void check_matrix(const TensorChecks& check, Phrase name, const Tensor& w, int64_t rows, int64_t columns,
                  const char* shape, Phrase like_name, const Tensor& like) {
  check.dtype(name, w, {like.scalar_type()});
  const bool is_matrix = w.dim() == 2 || (w.dim() == 4 && w.size(2) == 1 && w.size(3) == 1);
  check.that(is_matrix && w.size(0) == rows && w.size(1) == columns,
             concat(name, " of shape ", shape, " = [", rows, ", ", columns, "], or a 1x1 convolution's"),
             shape_text(w), concat("Sizes follow from ", like_name, " and b1."));
  check.same_device(name, w, like_name, like);
}

struct Weights {
  const Tensor &conv_weight, &w1, &b1, &w2, &b2;

  int64_t convolved() const { return conv_weight.size(0); }
  int64_t hidden() const { return b1.size(0); }
};

// `like`, called `name`, has the weights' dtype and device.
void check_weights(const TensorChecks& check, const Weights& w, int64_t channels, Phrase name,
                   const Tensor& like) {
  check_floats(check, name, like);
  const ScalarType type = like.scalar_type();
  check.dim("conv_weight", w.conv_weight, 4, "[c, c, 3, 3]");
  const int64_t convolved = w.convolved();
  check.that(convolved > 0 && w.conv_weight.size(1) == convolved && w.conv_weight.size(2) == 3 &&
                 w.conv_weight.size(3) == 3,
             "conv_weight of shape [c, c, 3, 3]", shape_text(w.conv_weight), "Give a 3x3 convolution.");
  check.that(convolved <= channels,
             concat("conv_weight.size(0) <= the channels of ", name, " (", channels, ")"), convolved,
             "The convolved channels are the first of x.");
  check.dtype("conv_weight", w.conv_weight, {type});
  check.same_device("conv_weight", w.conv_weight, name, like);
  check.dim("b1", w.b1, 1, "[M]");
  const int64_t hidden = w.hidden();
  check.that(hidden > 0 && hidden <= INT32_MAX, "b1 with elements", shape_text(w.b1), "M is at least 1.");
  check.exactly("b1", w.b1, type, {hidden}, "[M]", name, like);
  check_matrix(check, "w1", w.w1, hidden, channels, "[M, C]", name, like);
  check_matrix(check, "w2", w.w2, channels, hidden, "[C, M]", name, like);
  check.exactly("b2", w.b2, type, {channels}, "[C]", name, like);
}

// The weights without gaps, and what the kernels know of them.
struct DenseWeights {
  const Tensor conv_weight, w1, w2;

  explicit DenseWeights(const Weights& w)
      : conv_weight(torch::stable::contiguous(w.conv_weight)),
        w1(torch::stable::contiguous(w.w1)),
        w2(torch::stable::contiguous(w.w2)) {}

  PartialMlpParams params(const Weights& w) const {
    PartialMlpParams p{};
    p.conv_weight = conv_weight.const_data_ptr();
    p.w1 = w1.const_data_ptr();
    p.b1 = w.b1.const_data_ptr();
    p.w2 = w2.const_data_ptr();
    p.b2 = w.b2.const_data_ptr();
    p.channels = int32_t(w.b2.size(0));
    p.convolved = int32_t(w.convolved());
    p.hidden = int32_t(w.hidden());
    p.type = dtype_of_tensor(w.b1);
    return p;
  }
};

#if defined(TRANCHE_BACKEND_CPU)
// Of an image of one pixel: what is packed serves any.
PartialMlpParams packing_params(const Weights& w, const DenseWeights& dense) {
  PartialMlpParams p = dense.params(w);
  p.batch = 1;
  p.height = p.width = 1;
  return p;
}
#endif

int64_t packed_bytes([[maybe_unused]] const Weights& w, [[maybe_unused]] const DenseWeights& dense) {
#if defined(TRANCHE_BACKEND_CPU)
  return int64_t(KERNEL(partial_mlp_packed_bytes)(packing_params(w, dense)));
#else
  return 0;
#endif
}

Packing packing_of(const TensorChecks& check, const Weights& w) {
  return Packing(check, "partial_mlp_pack", w.b1, {w.b2.size(0), w.convolved(), w.hidden()});
}

Tensor partial_mlp(const Tensor& x, const Tensor& conv_weight, const Tensor& w1, const Tensor& b1,
                   const Tensor& w2, const Tensor& b2, int64_t activation, const std::optional<Tensor>& gate,
                   const std::optional<Tensor>& spatial_weight, const std::optional<Tensor>& spatial_bias,
                   bool residual, const std::optional<Tensor>& packed) {
  const TensorChecks check("partial_mlp");
  check_image_shape(check, x);
  const Weights weights{conv_weight, w1, b1, w2, b2};
  const int64_t channels = x.size(1);
  check_weights(check, weights, channels, "x", x);
  const ScalarType type = x.scalar_type();
  const int64_t convolved = weights.convolved(), hidden = weights.hidden();
  check.that(activation == 0 || activation == 1, "activation 0 (relu) or 1 (gelu)", activation,
             "Other activations are not fused.");
  if (gate) {
    check.exactly("gate", *gate, type, {x.size(0), channels - convolved}, "[B, C - c]", "x", x);
  }
  check.that(spatial_weight || !spatial_bias, "spatial_weight beside spatial_bias", "spatial_bias alone",
             "Give both or neither.");
  if (spatial_weight) check.exactly("spatial_weight", *spatial_weight, type, {hidden}, "[M]", "b1", x);
  if (spatial_bias) check.exactly("spatial_bias", *spatial_bias, type, {1}, "[1]", "x", x);

  const DenseWeights dense(weights);
  PartialMlpParams p = dense.params(weights);
  p.packed =
      packing_of(check, weights).checked("packed", packed, [&] { return packed_bytes(weights, dense); });
  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0) return y;
  p.x = x.const_data_ptr();
  p.gate = gate ? gate->const_data_ptr() : nullptr;
  p.spatial_weight = spatial_weight ? spatial_weight->const_data_ptr() : nullptr;
  p.spatial_bias = spatial_bias ? spatial_bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  for (int i = 0; i < 4; ++i) {
    p.x_stride[i] = x.stride(i);
    p.y_stride[i] = y.stride(i);
  }
  p.batch = int32_t(x.size(0));
  p.height = x.size(2);
  p.width = x.size(3);
  p.activation = PartialMlpParams::Activation(activation);
  p.residual = residual;
  const Tensor workspace = empty_on(x, {int64_t(KERNEL(partial_mlp_workspace)(p))}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  RUN_KERNEL(partial_mlp, p, x, dense.conv_weight, dense.w1, b1, dense.w2, b2, gate, spatial_weight,
             spatial_bias, y, workspace);
  return y;
}

Tensor partial_mlp_pack(const Tensor& conv_weight, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                        const Tensor& b2) {
  const TensorChecks check("partial_mlp_pack");
  const Weights weights{conv_weight, w1, b1, w2, b2};
  check.dim("b2", b2, 1, "[C]");
  check.that(b2.size(0) > 0 && b2.size(0) <= INT32_MAX, "b2 with elements", shape_text(b2),
             "C is at least 1.");
  check_weights(check, weights, b2.size(0), "b2", b2);
#if defined(TRANCHE_BACKEND_CPU)
  const DenseWeights dense(weights);
  PartialMlpParams p = packing_params(weights, dense);
  const Tensor packed = packing_of(check, weights).make(packed_bytes(weights, dense));
  const Tensor workspace = empty_on(b2, {int64_t(KERNEL(partial_mlp_workspace)(p))}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  p.packed = Packing::weights(packed);
  KERNEL(partial_mlp_pack)(p);
  return packed;
#else
  return empty_on(b2, {0}, ScalarType::Byte);
#endif
}

REGISTER_OP(partial_mlp,
            "(Tensor x, Tensor conv_weight, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int activation=0, "
            "Tensor? gate=None, Tensor? spatial_weight=None, Tensor? spatial_bias=None, bool residual=True, "
            "Tensor? packed=None) -> Tensor")
REGISTER_OP(partial_mlp_pack, "(Tensor conv_weight, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> Tensor")

}  // namespace
}  // namespace tranche
