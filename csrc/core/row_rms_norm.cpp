// tranche::row_rms_norm: schema, checks, allocation.
#include "core/row_rms_norm.h"

#include "core/torch_glue.h"

namespace tranche {
namespace {

Tensor row_rms_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  const TensorChecks check("row_rms_norm");
  check.dim("x", x, 2, "[M, H]");
  check.dtype("x", x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  check.last_contiguous("x", x);
  check.exactly("weight", weight, x.scalar_type(), {x.size(1)}, "[H]", "x", x);
  check.that(epsilon >= 0.0 && epsilon < 1e30, "epsilon >= 0", epsilon, "Use the model's, such as 1e-6.");

  Tensor out = empty_on(x, {x.size(0), x.size(1)}, x.scalar_type());
  if (out.numel() == 0) return out;
  RowRmsNormParams params{};
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.x_stride = x.stride(0);
  params.rows = x.size(0);
  params.width = x.size(1);
  params.epsilon = float(epsilon);
  params.type = dtype_of_tensor(x);
  RUN_KERNEL(row_rms_norm, params, x, weight, out);
  return out;
}

REGISTER_OP(row_rms_norm, "(Tensor x, Tensor weight, float epsilon) -> Tensor")

}  // namespace
}  // namespace tranche
