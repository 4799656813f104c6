// tranche::channel_gate: schema, checks, allocation.
#include "pconv/channel_gate.h"

#include "pconv/channel_stats_glue.h"

namespace tranche {
namespace {

Tensor channel_gate(const Tensor& x, int64_t start, const Tensor& weight, const Tensor& bias) {
  const TensorChecks check("channel_gate");
  check_measured(check, x, start);
  const int64_t n = x.size(1) - start;
  check.exactly("weight", weight, x.scalar_type(), {n, 2 * n}, "[C - start, 2 (C - start)]", "x", x);
  check.exactly("bias", bias, x.scalar_type(), {n}, "[C - start]", "x", x);
  const Tensor out = empty_on(x, {x.size(0), n}, x.scalar_type());
  if (out.numel() == 0) return out;
  const bool wide = x.scalar_type() == ScalarType::Double;
  const Tensor moments = empty_on(x, {2, x.size(0), n}, wide ? ScalarType::Double : ScalarType::Float);
  char* mean = static_cast<char*>(moments.mutable_data_ptr());
  ChannelGateParams p{};
  p.stats =
      stats_params(x, start, mean, mean + x.size(0) * n * int64_t(wide ? sizeof(double) : sizeof(float)));
  p.weight = weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.out = out.mutable_data_ptr();
  RUN_KERNEL(channel_gate, p, x, weight, bias, moments, out);
  return out;
}

REGISTER_OP(channel_gate, "(Tensor x, SymInt start, Tensor weight, Tensor bias) -> Tensor")

}  // namespace
}  // namespace tranche
