// tranche::bits_unpack, bits_dequantize, bits_materialize: schemas, checks, allocation.
#include "bits/bits_unpack.h"

#include "bits/packed_checks.h"

namespace tranche {
namespace {

Tensor bits_unpack(const Tensor& data, int64_t out_features, int64_t in_features, int64_t layout,
                   int64_t bits) {
  const TensorChecks check("bits_unpack");
  BitsUnpackParams params{};
  params.w = packed_weight(check, data, out_features, in_features, layout, bits);
  Tensor out = empty_on(data, {out_features, in_features}, ScalarType::Char);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  params.groups = 1;
  params.to = UnpackTo::codes;
  RUN_KERNEL(bits_unpack, params, data, out);
  return out;
}

Tensor bits_materialize(const Tensor& data, int64_t out_features, int64_t in_features, int64_t layout,
                        int64_t bits) {
  const TensorChecks check("bits_materialize");
  BitsUnpackParams params{};
  params.w = packed_weight(check, data, out_features, in_features, layout, bits);
  Tensor out = empty_on(data, {data.size(0)}, ScalarType::Byte);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  params.groups = 1;
  params.to = UnpackTo::plain;
  RUN_KERNEL(bits_unpack, params, data, out);
  return out;
}

Tensor bits_dequantize(const Tensor& data, const Tensor& scale, int64_t out_features, int64_t in_features,
                       int64_t layout, int64_t bits, ScalarType dtype) {
  const TensorChecks check("bits_dequantize");
  BitsUnpackParams params{};
  params.w = packed_weight(check, data, out_features, in_features, layout, bits);
  params.groups = check_scale(check, scale, params.w, data);
  const bool supported =
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  check.that(supported, "dtype torch.float32 or torch.float16 or torch.bfloat16", dtype_text(dtype),
             "Convert the result.");
  Tensor out = empty_on(data, {out_features, in_features}, dtype);
  if (out.numel() == 0) return out;
  params.scale = tranche::data<float>(scale);
  params.out = out.mutable_data_ptr();
  params.out_type = dtype_of_tensor(out);
  params.to = UnpackTo::floats;
  RUN_KERNEL(bits_unpack, params, data, scale, out);
  return out;
}

REGISTER_OP(bits_unpack,
            "(Tensor data, SymInt out_features, SymInt in_features, int layout, int bits) -> Tensor")
REGISTER_OP(bits_materialize,
            "(Tensor data, SymInt out_features, SymInt in_features, int layout, int bits) -> Tensor")
REGISTER_OP(bits_dequantize,
            "(Tensor data, Tensor scale, SymInt out_features, SymInt in_features, int layout, int bits, "
            "ScalarType dtype) -> Tensor")

}  // namespace
}  // namespace tranche
