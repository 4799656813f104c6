// tranche::bits_pack: schema, checks, allocation.
#include "bits/bits_pack.h"

#include "bits/packed_checks.h"

namespace tranche {
namespace {

Tensor bits_pack(const Tensor& codes, int64_t layout) {
  const TensorChecks check("bits_pack");
  check.dim("codes", codes, 2, "[out_features, in_features]");
  check.dtype("codes", codes, {ScalarType::Char});
  check.last_contiguous("codes", codes);
  check.that(layout == kLayoutGuardedPlanes || layout == kLayoutSinglePlanes,
             concat("layout ", kLayoutGuardedPlanes, " (guarded planes) or ", kLayoutSinglePlanes,
                    " (single planes)"),
             layout, "These serve every precision; materialize makes plain codes for one.");
  BitsPackParams params{};
  params.out_features = codes.size(0);
  params.in_features = codes.size(1);
  params.row_tiles = tiles_of(params.out_features, kTileRows);
  params.input_tiles = tiles_of(params.in_features, kTileInputs);
  params.code_stride = codes.stride(0);
  params.single = layout == kLayoutSinglePlanes;
  Tensor packed = empty_on(codes, {packed_bytes(params.out_features, params.in_features)}, ScalarType::Byte);
  if (packed.numel() == 0) return packed;
  params.codes = data<int8_t>(codes);
  params.data = mutable_data<uint8_t>(packed);
  RUN_KERNEL(bits_pack, params, codes, packed);
  return packed;
}

REGISTER_OP(bits_pack, "(Tensor codes, int layout=1) -> Tensor")

}  // namespace
}  // namespace tranche
