// tranche::bits_round: schema, checks, allocation.
#include "bits/bits_round.h"

#include "bits/packed_checks.h"

namespace tranche {
namespace {

Tensor bits_round(const Tensor& codes, int64_t bits) {
  const TensorChecks check("bits_round");
  check.dtype("codes", codes, {ScalarType::Char});
  check_bits(check, bits);
  const Tensor from = torch::stable::contiguous(codes);
  Tensor out = torch::stable::empty_like(from);
  if (out.numel() == 0) return out;
  BitsRoundParams params{};
  params.codes = data<int8_t>(from);
  params.out = mutable_data<int8_t>(out);
  params.count = from.numel();
  params.bits = int32_t(bits);
  RUN_KERNEL(bits_round, params, from, out);
  return out;
}

REGISTER_OP(bits_round, "(Tensor codes, int bits) -> Tensor")

}  // namespace
}  // namespace tranche
