// The whole block of a partial network: what the kernel behind partial_mlp receives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/numeric.h"
#include "pconv/partial_conv2d.h"

namespace tranche {

// Per pixel, with u = [3x3 convolution of x's first c channels, padding 1; x's other channels * gate]:
//   h = activation(w1 u + b1), o = w2 h,
//   o[first C - C / 2] *= hardsigmoid(spatial_weight . h + spatial_bias),
//   y = o + b2 (+ x).
// Strides are in elements.
struct PartialMlpParams {
  enum class Activation : int32_t { relu, gelu };

  const void* x;               // [B, C, H, W]
  const void* conv_weight;     // [c, c, 3, 3], contiguous like all that follow
  const void* w1;              // [M, C]
  const void* b1;              // [M]
  const void* w2;              // [C, M]
  const void* b2;              // [C]
  const void* gate;            // [B, C - c] or null
  const void* spatial_weight;  // [M] or null
  const void* spatial_bias;    // [1] or null
  void* y;                     // [B, C, H, W] out
  void* workspace;             // partial_mlp_workspace(params) bytes
  void* packed;                // weights as partial_mlp_pack put them in order, or null: CPU only

  int64_t x_stride[4], y_stride[4];
  int64_t height, width;
  int32_t batch, channels, convolved, hidden;
  Activation activation;
  bool residual;
  DType type;  // of all tensors; sums are float, or double for f64
};

// The convolution in front, its outputs dense or wherever the caller has y point.
static inline PartialConv2dParams convolution_of(const PartialMlpParams& p) {
  PartialConv2dParams conv{};
  conv.x = p.x;
  conv.weight = p.conv_weight;
  for (int i = 0; i < 4; ++i) conv.x_stride[i] = p.x_stride[i];
  conv.height = conv.out_height = p.height;
  conv.width = conv.out_width = p.width;
  conv.batch = p.batch;
  conv.channels = p.channels;
  conv.c_in = conv.c_out = p.convolved;
  conv.groups = 1;
  for (int i = 0; i < 2; ++i) {
    conv.kernel[i] = 3;
    conv.stride[i] = conv.padding[i] = conv.dilation[i] = 1;
  }
  conv.type = p.type;
  return conv;
}

namespace cpu {
size_t partial_mlp_workspace(const PartialMlpParams&);
void partial_mlp(const PartialMlpParams&);
// Fills params.packed, of so many bytes, which serves images of any size.
size_t partial_mlp_packed_bytes(const PartialMlpParams&);
void partial_mlp_pack(const PartialMlpParams&);
}  // namespace cpu

namespace cuda {
size_t partial_mlp_workspace(const PartialMlpParams&);
void partial_mlp(const PartialMlpParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
