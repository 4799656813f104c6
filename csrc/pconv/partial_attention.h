// The attention of the last channels of an image: what the kernels behind partial_attention receive. Its two
// linear layers are convolutions of single pixels by the kernels of partial_conv2d, which run in between.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/numeric.h"

namespace tranche {

// n = C' = channels - start, and d = n / heads; strides are in elements.
struct PartialAttentionParams {
  const void* x;     // [B, C, H, W]
  const void* bias;  // [heads, HW, HW], contiguous
  void* pixels;      // [B, H, W, n], contiguous: normalised, later attended to
  void* products;    // [B, H, W, 3 n], contiguous: q, k, v, heads of d each; later [B, H, W, n]: projected
  void* y;           // [B, C, H, W] out
  void* workspace;   // partial_attention_workspace(params) bytes

  int64_t x_stride[4], y_stride[4];
  int64_t height, width;
  int32_t batch, channels, start, heads;
  double eps;
  DType type;  // of all tensors; sums are float, or double for f64
};

// norm:   pixels = (x2 - mean) / sqrt(var + eps) over the n channels x2 of each pixel of x
// mix:    pixels = softmax(q k^T / sqrt(d) + bias) v for each image and head of products
// finish: y = x, plus products (projected) on the n channels
namespace cpu {
size_t partial_attention_workspace(const PartialAttentionParams&);
void partial_attention_norm(const PartialAttentionParams&);
void partial_attention_mix(const PartialAttentionParams&);
void partial_attention_finish(const PartialAttentionParams&);
}  // namespace cpu

namespace cuda {
size_t partial_attention_workspace(const PartialAttentionParams&);
void partial_attention_norm(const PartialAttentionParams&, void* stream);
void partial_attention_mix(const PartialAttentionParams&, void* stream);
void partial_attention_finish(const PartialAttentionParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
