// tranche::bits_fake_quantize_activations and its backward: schemas, checks, allocation.
#include "bits/bits_fake_quantize_activations.h"

#include "bits/fake_quantize_checks.h"

namespace tranche {
namespace {

BitsFakeQuantizeActivationsParams checked(const TensorChecks& check, const Tensor& x, const Tensor& scale,
                                          const std::optional<Tensor>& zero, int64_t bits) {
  check_float(check, "x", x);
  check.contiguous("x", x);
  check.that(bits >= 1 && bits <= 8, "bits in 1 to 8", bits, "Activations are codes of a byte.");
  check_learned(check, "scale", scale, "x", x);
  check.that(scale.numel() == 1, "scale of one element", shape_text(scale), "One scale serves a tensor.");
  if (zero) {
    check_learned(check, "zero", *zero, "x", x);
    check.that(zero->numel() == 1, "zero of one element", shape_text(*zero), "One zero serves a tensor.");
  }
  BitsFakeQuantizeActivationsParams params{};
  params.x = x.const_data_ptr();
  params.scale = scale.const_data_ptr();
  params.zero = zero ? zero->const_data_ptr() : nullptr;
  params.count = x.numel();
  params.chunks = (params.count + kFakeChunk - 1) / kFakeChunk;
  params.bits = int32_t(bits);
  params.type = dtype_of_tensor(x);
  return params;
}

Tensor bits_fake_quantize_activations(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero,
                                      int64_t bits) {
  const TensorChecks check("bits_fake_quantize_activations");
  BitsFakeQuantizeActivationsParams params = checked(check, x, scale, zero, bits);
  Tensor out = torch::stable::empty_like(x);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  RUN_KERNEL(bits_fake_quantize_activations, params, x, scale, zero, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> bits_fake_quantize_activations_backward(const Tensor& grad,
                                                                           const Tensor& x,
                                                                           const Tensor& scale,
                                                                           const std::optional<Tensor>& zero,
                                                                           int64_t bits) {
  const TensorChecks check("bits_fake_quantize_activations_backward");
  BitsFakeQuantizeActivationsParams params = checked(check, x, scale, zero, bits);
  check_grad(check, grad, "x", x);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_scale = torch::stable::empty_like(scale), grad_zero = torch::stable::empty_like(scale);
  if (x.numel() == 0) {
    return {grad_x, torch::stable::zero_(grad_scale), torch::stable::zero_(grad_zero)};
  }
  const Tensor partial = empty_on(x, {params.chunks, 2}, ScalarType::Double);
  params.grad = grad.const_data_ptr();
  params.out = grad_x.mutable_data_ptr();
  params.partial = partial.mutable_data_ptr();
  params.grad_scale = grad_scale.mutable_data_ptr();
  params.grad_zero = grad_zero.mutable_data_ptr();
  RUN_KERNEL(bits_fake_quantize_activations, params, x, scale, zero, grad, grad_x, partial, grad_scale,
             grad_zero);
  return {grad_x, grad_scale, grad_zero};
}

REGISTER_OP(bits_fake_quantize_activations, "(Tensor x, Tensor scale, Tensor? zero, int bits) -> Tensor")
REGISTER_OP(bits_fake_quantize_activations_backward,
            "(Tensor grad, Tensor x, Tensor scale, Tensor? zero, int bits) -> (Tensor, Tensor, Tensor)")

}  // namespace
}  // namespace tranche
