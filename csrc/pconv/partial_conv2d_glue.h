// What the ops that convolve share of torch's side: packed weights, and the way to the kernel.
#pragma once

#include "core/torch_glue.h"
#include "pconv/packed.h"
#include "pconv/partial_conv2d.h"

namespace tranche {

// The same weight before an image of one pixel: what is packed serves any.
inline PartialConv2dParams packing_params(PartialConv2dParams p) {
  p.padding[0] = p.padding[1] = 0;
  p.batch = 1;
  p.height = p.width = p.out_height = p.out_width = 1;
  p.copies = p.in_place = false;
  return p;
}

inline int64_t packed_bytes([[maybe_unused]] const PartialConv2dParams& p) {
#if defined(TRANCHE_BACKEND_CPU)
  return int64_t(KERNEL(partial_conv2d_packed_bytes)(packing_params(p)));
#else
  return 0;
#endif
}

inline Packing packing_of(const TensorChecks& check, const Tensor& weight, const PartialConv2dParams& p) {
  return Packing(check, "conv2d_pack", weight,
                 {p.c_out, p.c_in / p.groups, p.kernel[0], p.kernel[1], p.groups, p.stride[0], p.stride[1],
                  p.dilation[0], p.dilation[1]});
}

// What is to stand in params.packed for the argument called `name`.
inline void* checked_packed(const TensorChecks& check, Phrase name, const std::optional<Tensor>& packed,
                            const Tensor& weight, const PartialConv2dParams& p) {
  return packing_of(check, weight, p).checked(name, packed, [&] { return packed_bytes(p); });
}

// Runs with params.y already set; `y` is what may be written.
inline void run_conv2d(PartialConv2dParams& p, const Tensor& x, [[maybe_unused]] const Tensor& weight,
                       [[maybe_unused]] const std::optional<Tensor>& bias, [[maybe_unused]] const Tensor& y) {
  const Tensor workspace = empty_on(x, {int64_t(KERNEL(partial_conv2d_workspace)(p))}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  RUN_KERNEL(partial_conv2d, p, x, weight, bias, y, workspace);
}

}  // namespace tranche
