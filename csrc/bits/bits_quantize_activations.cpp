// tranche::bits_quantize_activations: schema, checks, allocation.
#include "bits/bits_quantize_activations.h"

#include "core/torch_glue.h"

namespace tranche {
namespace {

std::tuple<Tensor, Tensor, Tensor> bits_quantize_activations(const Tensor& x) {
  const TensorChecks check("bits_quantize_activations");
  check.dim("x", x, 2, "[M, I]");
  check.dtype("x", x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  check.last_contiguous("x", x);
  check.that(x.size(1) <= INT32_MAX / 128, concat("x.size(-1) <= ", INT32_MAX / 128), x.size(1),
             "Longer rows overflow row_sum.");
  const int64_t rows = x.size(0), inputs = x.size(1);
  Tensor codes = empty_on(x, {rows, inputs}, ScalarType::Char);
  Tensor scale = empty_on(x, {rows, 1}, ScalarType::Float);
  Tensor row_sum = empty_on(x, {rows}, ScalarType::Int);
  if (rows == 0) return {codes, scale, row_sum};
  BitsQuantizeActivationsParams params{};
  params.x = x.const_data_ptr();
  params.codes = mutable_data<int8_t>(codes);
  params.scale = mutable_data<float>(scale);
  params.row_sum = mutable_data<int32_t>(row_sum);
  params.x_stride = x.stride(0);
  params.rows = params.padded_rows = rows;
  params.inputs = params.padded_inputs = inputs;
  params.groups = 1;
  params.tile_rows = 1;
  params.x_type = dtype_of_tensor(x);
  RUN_KERNEL(bits_quantize_activations, params, x, codes, scale, row_sum);
  return {codes, scale, row_sum};
}

REGISTER_OP(bits_quantize_activations, "(Tensor x) -> (Tensor codes, Tensor scale, Tensor row_sum)")

}  // namespace
}  // namespace tranche
