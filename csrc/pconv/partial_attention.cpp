// tranche::partial_attention: schema, checks, allocation, and its kernels one after the other.
#include "pconv/partial_attention.h"

#include "pconv/image_glue.h"
#include "pconv/partial_conv2d_glue.h"

namespace tranche {
namespace {

// A linear layer [out, in] as a convolution of single pixels.
PartialConv2dParams linear_params(const Tensor& weight, const Tensor& bias) {
  PartialConv2dParams p{};
  p.weight = weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.c_in = p.channels = int32_t(weight.size(1));
  p.c_out = int32_t(weight.size(0));
  p.groups = 1;
  for (int i = 0; i < 2; ++i) p.kernel[i] = p.stride[i] = p.dilation[i] = 1;
  p.type = dtype_of_tensor(weight);
  return p;
}

// The strides of a contiguous [B, H, W, channels], in the order B, channels, H, W.
void set_dense(int64_t (&strides)[4], const Tensor& x, int64_t channels) {
  strides[0] = x.size(2) * x.size(3) * channels;
  strides[1] = 1;
  strides[2] = x.size(3) * channels;
  strides[3] = channels;
}

// to = the layer of from, both contiguous pixels of the images of x.
void run_linear(PartialConv2dParams& p, const Tensor& x, const Tensor& from, const Tensor& weight,
                const Tensor& bias, const Tensor& to) {
  p.x = from.const_data_ptr();
  p.y = to.mutable_data_ptr();
  set_dense(p.x_stride, x, p.c_in);
  set_dense(p.y_stride, x, p.c_out);
  p.batch = int32_t(x.size(0));
  p.height = p.out_height = x.size(2);
  p.width = p.out_width = x.size(3);
  run_conv2d(p, from, weight, bias, to);
}

Tensor partial_attention(const Tensor& x, int64_t start, const Tensor& qkv_weight, const Tensor& qkv_bias,
                         const Tensor& proj_weight, const Tensor& proj_bias, const Tensor& bias,
                         int64_t num_heads, double eps, const std::optional<Tensor>& qkv_packed,
                         const std::optional<Tensor>& proj_packed) {
  const TensorChecks check("partial_attention");
  check_images(check, x);
  check.that(x.size(1) > 0, "x with channels", shape_text(x), "Some of them are attended.");
  check.that(start >= 0 && start < x.size(1),
             concat("start in [0, x.size(1) - 1] = [0, ", x.size(1) - 1, "]"), start,
             "The channels from start on are attended, at least one.");
  const ScalarType type = x.scalar_type();
  const int64_t n = x.size(1) - start, pixels = x.size(2) * x.size(3);
  check.that(num_heads >= 1 && n % num_heads == 0,
             concat("num_heads >= 1 that divides x.size(1) - start (", n, ")"), num_heads,
             "Every head has as many channels.");
  check.that(eps >= 0 && eps <= 1e30, "eps in [0, 1e30]", eps, "It is added to variances.");
  check.that(3 * n <= INT32_MAX && pixels <= INT32_MAX, "3 (C - start) and H W below 2^31", shape_text(x),
             "Cut the input in pieces.");
  check.exactly("qkv_weight", qkv_weight, type, {3 * n, n}, "[3 (C - start), C - start]", "x", x);
  check.exactly("qkv_bias", qkv_bias, type, {3 * n}, "[3 (C - start)]", "x", x);
  check.exactly("proj_weight", proj_weight, type, {n, n}, "[C - start, C - start]", "x", x);
  check.exactly("proj_bias", proj_bias, type, {n}, "[C - start]", "x", x);
  check.exactly("bias", bias, type, {num_heads, pixels, pixels}, "[num_heads, H W, H W]", "x", x);
  PartialConv2dParams qkv = linear_params(qkv_weight, qkv_bias), proj = linear_params(proj_weight, proj_bias);
  qkv.packed = checked_packed(check, "qkv_packed", qkv_packed, qkv_weight, qkv);
  proj.packed = checked_packed(check, "proj_packed", proj_packed, proj_weight, proj);
  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0) return y;

  const Tensor dense = empty_on(x, {x.size(0), x.size(2), x.size(3), n}, type);
  const Tensor products = empty_on(x, {x.size(0), x.size(2), x.size(3), 3 * n}, type);
  PartialAttentionParams p{};
  p.x = x.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.pixels = dense.mutable_data_ptr();
  p.products = products.mutable_data_ptr();
  p.y = y.mutable_data_ptr();
  for (int i = 0; i < 4; ++i) {
    p.x_stride[i] = x.stride(i);
    p.y_stride[i] = y.stride(i);
  }
  p.height = x.size(2);
  p.width = x.size(3);
  p.batch = int32_t(x.size(0));
  p.channels = int32_t(x.size(1));
  p.start = int32_t(start);
  p.heads = int32_t(num_heads);
  p.eps = eps;
  p.type = dtype_of_tensor(x);
  const Tensor workspace = empty_on(x, {int64_t(KERNEL(partial_attention_workspace)(p))}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();

  RUN_KERNEL(partial_attention_norm, p, x, dense, workspace);
  run_linear(qkv, x, dense, qkv_weight, qkv_bias, products);
  RUN_KERNEL(partial_attention_mix, p, products, bias, dense, workspace);
  run_linear(proj, x, dense, proj_weight, proj_bias, products);
  RUN_KERNEL(partial_attention_finish, p, x, products, y, workspace);
  return y;
}

REGISTER_OP(partial_attention,
            "(Tensor x, SymInt start, Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight, "
            "Tensor proj_bias, Tensor bias, int num_heads, float eps=1e-6, Tensor? qkv_packed=None, "
            "Tensor? proj_packed=None) -> Tensor")

}  // namespace
}  // namespace tranche
