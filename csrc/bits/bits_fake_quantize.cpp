// tranche::bits_fake_quantize and its backward: schemas, checks, allocation.
#include "bits/bits_fake_quantize.h"

#include "bits/fake_quantize_checks.h"

namespace tranche {
namespace {

BitsFakeQuantizeParams checked(const TensorChecks& check, const Tensor& w, const Tensor& scale, int64_t bits,
                               int64_t stored_bits) {
  check_float(check, "w", w);
  check.dim("w", w, 2, "[O, I]");
  check.contiguous("w", w);
  check.that(stored_bits >= 2 && stored_bits <= 8, "stored_bits in 2 to 8", stored_bits,
             "At most eight bits are stored; two are the fewest of a signed code.");
  check.that(bits >= 2 && bits <= stored_bits, concat("bits in 2 to stored_bits (", stored_bits, ")"), bits,
             "Rounding only ever takes bits away.");
  check_learned(check, "scale", scale, "w", w);
  check.that(scale.dim() == 1 || scale.dim() == 2, "scale of shape [O] or [O, groups]", shape_text(scale),
             "One scale a channel, or one a group of its inputs.");
  check.equal("scale.size(0)", scale.size(0), "w.size(0)", w.size(0), "Each output has its scale.");
  BitsFakeQuantizeParams params{};
  params.rows = w.size(0);
  params.groups = scale.dim() == 1 ? 1 : scale.size(1);
  check.that(params.groups > 0 && w.size(1) % params.groups == 0,
             concat("scale.size(1) that divides w.size(1) (", w.size(1), ")"), params.groups,
             "Give every group as many inputs.");
  params.group_size = w.size(1) / params.groups;
  params.w = w.const_data_ptr();
  params.scale = scale.const_data_ptr();
  params.bits = int32_t(bits);
  params.stored_bits = int32_t(stored_bits);
  params.type = dtype_of_tensor(w);
  return params;
}

Tensor bits_fake_quantize(const Tensor& w, const Tensor& scale, int64_t bits, int64_t stored_bits) {
  BitsFakeQuantizeParams params = checked(TensorChecks("bits_fake_quantize"), w, scale, bits, stored_bits);
  Tensor out = torch::stable::empty_like(w);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  RUN_KERNEL(bits_fake_quantize, params, w, scale, out);
  return out;
}

std::tuple<Tensor, Tensor> bits_fake_quantize_backward(const Tensor& grad, const Tensor& w,
                                                       const Tensor& scale, int64_t bits,
                                                       int64_t stored_bits) {
  const TensorChecks check("bits_fake_quantize_backward");
  BitsFakeQuantizeParams params = checked(check, w, scale, bits, stored_bits);
  check_grad(check, grad, "w", w);
  Tensor grad_w = torch::stable::empty_like(w), grad_scale = torch::stable::empty_like(scale);
  if (scale.numel() == 0) return {grad_w, grad_scale};
  if (w.numel() == 0) return {grad_w, torch::stable::zero_(grad_scale)};
  params.grad = grad.const_data_ptr();
  params.out = grad_w.mutable_data_ptr();
  params.grad_scale = grad_scale.mutable_data_ptr();
  RUN_KERNEL(bits_fake_quantize, params, w, scale, grad, grad_w, grad_scale);
  return {grad_w, grad_scale};
}

REGISTER_OP(bits_fake_quantize, "(Tensor w, Tensor scale, int bits, int stored_bits) -> Tensor")
REGISTER_OP(bits_fake_quantize_backward,
            "(Tensor grad, Tensor w, Tensor scale, int bits, int stored_bits) -> (Tensor, Tensor)")

}  // namespace
}  // namespace tranche
