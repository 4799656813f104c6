// tranche::row_silu_mul: schema, checks, allocation.
#include "core/row_silu_mul.h"

#include "core/torch_glue.h"

namespace tranche {
namespace {

Tensor row_silu_mul(const Tensor& gate, const Tensor& up) {
  const TensorChecks check("row_silu_mul");
  check.dim("gate", gate, 2, "[M, I]");
  check.dtype("gate", gate, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  check.last_contiguous("gate", gate);
  check.dim("up", up, 2, "[M, I]");
  check.dtype("up", up, {gate.scalar_type()});
  check.same_device("up", up, "gate", gate);
  check.last_contiguous("up", up);
  check.equal("up.size(0)", up.size(0), "gate.size(0)", gate.size(0), "Each gate has its value.");
  check.equal("up.size(1)", up.size(1), "gate.size(1)", gate.size(1), "Each gate has its value.");

  Tensor out = empty_on(gate, {gate.size(0), gate.size(1)}, gate.scalar_type());
  if (out.numel() == 0) return out;
  RowSiluMulParams params{};
  params.gate = gate.const_data_ptr();
  params.up = up.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.gate_stride = gate.stride(0);
  params.up_stride = up.stride(0);
  params.rows = gate.size(0);
  params.width = gate.size(1);
  params.type = dtype_of_tensor(gate);
  RUN_KERNEL(row_silu_mul, params, gate, up, out);
  return out;
}

REGISTER_OP(row_silu_mul, "(Tensor gate, Tensor up) -> Tensor")

}  // namespace
}  // namespace tranche
