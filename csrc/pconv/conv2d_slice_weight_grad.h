// The gradient of a convolution's weight: what the kernel behind conv2d_slice_weight_grad receives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/numeric.h"

namespace tranche {

// grad_weight[o, ci, ky, kx] = sum over b, i, j of
//   grad_y[b, o, i, j] * x[b, start + group(o) * c_in / groups + ci,
//                          i * stride[0] - padding[0] + ky * dilation[0], the same for j]
// with zeros outside x. Strides are in elements; pairs are (vertical, horizontal).
struct Conv2dSliceWeightGradParams {
  const void* x;       // [B, C, H, W]
  const void* grad_y;  // [B, c_out, H', W'], with at least one pixel
  void* grad_weight;   // [c_out, c_in / groups, kh, kw] out, contiguous
  void* workspace;     // conv2d_slice_weight_grad_workspace(params) bytes

  int64_t x_stride[4], y_stride[4];
  int64_t height, width, out_height, out_width;
  int32_t batch, start;
  int32_t c_in, c_out, groups;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  DType type;  // of x, grad_y and grad_weight; sums are float, or double for f64
};

// A channel each.
static inline bool is_depthwise(const Conv2dSliceWeightGradParams& p) {
  return p.c_in == p.groups && p.c_out == p.groups && p.groups > 1;
}

namespace cpu {
size_t conv2d_slice_weight_grad_workspace(const Conv2dSliceWeightGradParams&);
void conv2d_slice_weight_grad(const Conv2dSliceWeightGradParams&);
}  // namespace cpu

namespace cuda {
size_t conv2d_slice_weight_grad_workspace(const Conv2dSliceWeightGradParams&);
void conv2d_slice_weight_grad(const Conv2dSliceWeightGradParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
