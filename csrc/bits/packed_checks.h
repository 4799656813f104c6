// What every op of the family asks of a packed weight and of its scales.
#pragma once

#include "bits/packed.h"
#include "core/torch_glue.h"

namespace tranche {

inline void check_bits(const TensorChecks& check, int64_t bits) {
  check.that(bits >= 2 && bits <= 8, "bits in {2, 3, 4, 5, 6, 7, 8}", bits,
             "Eight bits are stored; two are the fewest that a signed code can round to.");
}

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

inline int64_t packed_bytes(int64_t out_features, int64_t in_features) {
  return tiles_of(out_features, kTileRows) * tiles_of(in_features, kTileInputs) * kTileBytes8;
}

// The weight as a kernel receives it.
inline PackedWeight packed_weight(const TensorChecks& check, const Tensor& data, int64_t out_features,
                                  int64_t in_features, int64_t layout, int64_t bits) {
  check_bits(check, bits);
  const bool plain = layout >= kLayoutPlain + 2 && layout <= kLayoutPlain + 8;
  check.that(layout == kLayoutGuardedPlanes || layout == kLayoutSinglePlanes || plain,
             concat("layout ", kLayoutGuardedPlanes, " (guarded planes), ", kLayoutSinglePlanes,
                    " (single planes) or ", kLayoutPlain + 2, " to ", kLayoutPlain + 8, " (plain codes)"),
             layout, "Another version packed this weight: unpack it there, and pack its codes here.");
  check.that(!plain || layout == kLayoutPlain + bits,
             concat("bits == ", layout - kLayoutPlain, ", for which the weight was materialized"), bits,
             "Keep the packed weight for the other precisions.");
  check.dtype("data", data, {ScalarType::Byte});
  check.dim("data", data, 1, "[bytes]");
  check.contiguous("data", data);
  check.that(out_features >= 0 && in_features >= 0, "out_features and in_features >= 0",
             concat(out_features, " and ", in_features), "Give the shape of the codes that were packed.");
  check.that(data.size(0) == packed_bytes(out_features, in_features),
             concat("data of ", packed_bytes(out_features, in_features), " bytes for ", out_features, " x ",
                    in_features, " codes"),
             data.size(0), "Pass what tranche.bits.pack made of codes of this shape.");
  check.that(reinterpret_cast<uintptr_t>(data.const_data_ptr()) % 16 == 0, "data aligned to 16 bytes",
             "a view that is not", "Call data.clone().");
  PackedWeight w{};
  w.data = tranche::data<uint8_t>(data);
  w.out_features = out_features;
  w.in_features = in_features;
  w.row_tiles = tiles_of(out_features, kTileRows);
  w.input_tiles = tiles_of(in_features, kTileInputs);
  w.bits = int32_t(bits);
  w.single = layout == kLayoutSinglePlanes;
  w.planes = plain ? 0 : planes_of_bits(int(bits), w.single);
  return w;
}

// scale [O], or [O, groups] with in_features / groups a multiple of 32. Returns groups.
inline int64_t check_scale(const TensorChecks& check, const Tensor& scale, const PackedWeight& w,
                           const Tensor& data) {
  check.dtype("scale", scale, {ScalarType::Float});
  check.same_device("scale", scale, "data", data);
  check.contiguous("scale", scale);
  check.that(scale.dim() == 1 || scale.dim() == 2, "scale of shape [O] or [O, I / group_size]",
             shape_text(scale), "One scale a channel, or one a group of its inputs.");
  check.equal("scale.size(0)", scale.size(0), "out_features", w.out_features, "Each output has its scale.");
  if (scale.dim() == 1) return 1;
  const int64_t groups = scale.size(1);
  const bool whole =
      groups > 0 && w.in_features % groups == 0 && (groups == 1 || w.in_features / groups % kTileInputs == 0);
  check.that(
      whole,
      concat("scale.size(1) that cuts ", w.in_features, " inputs into groups of a multiple of ", kTileInputs),
      groups, "Quantize with group_size a multiple of 32 that divides in_features.");
  return groups;
}

}  // namespace tranche
