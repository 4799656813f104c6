// Convolution of some channels: what the kernel behind partial_conv2d, partial_conv2d_ and conv2d_slice
// receives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/numeric.h"

namespace tranche {

// y[b, y_start + o, i, j] = bias[o] + sum over channels ci of o's group, taps ky, kx of
//   weight[o, ci, ky, kx] * x[b, start + group(o) * c_in / groups + ci,
//                             i * stride[0] - padding[0] + ky * dilation[0], the same for j]
// with zeros outside x. Strides are in elements; pairs are (vertical, horizontal).
struct PartialConv2dParams {
  const void* x;       // [B, C, H, W]
  const void* weight;  // [c_out, c_in / groups, kh, kw], contiguous
  const void* bias;    // [c_out] or null
  void* y;             // [B, C or c_out, H', W'] out; x itself when in_place
  void* workspace;     // partial_conv2d_workspace(params) bytes
  void* packed;        // weight and bias as partial_conv2d_pack put them in order, or null: CPU only

  int64_t x_stride[4], y_stride[4];
  int64_t height, width, out_height, out_width;
  int32_t batch, channels, start, y_start;
  int32_t c_in, c_out, groups;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  bool copies;    // y also gets the channels of x outside [start, start + c_in)
  bool in_place;  // y is x: no input may be overwritten before every output that needs it has read it
  DType type;     // of x, weight, bias and y; sums are float, or double for f64
};

namespace cpu {
size_t partial_conv2d_workspace(const PartialConv2dParams&);
void partial_conv2d(const PartialConv2dParams&);
// Fills params.packed, of so many bytes, which serves images of any size.
size_t partial_conv2d_packed_bytes(const PartialConv2dParams&);
void partial_conv2d_pack(const PartialConv2dParams&);
}  // namespace cpu

namespace cuda {
size_t partial_conv2d_workspace(const PartialConv2dParams&);
void partial_conv2d(const PartialConv2dParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
