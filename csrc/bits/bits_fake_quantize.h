// Weights on the grid of l bits in floating point, and the way back: what a kernel of these ops receives.
//
//   v = w / scale,  W_h = clip(round(v)),  W_l = min(floor(W_h / 2^(h-l) + 1/2), 2^(l-1) - 1)
//   out = W_l * 2^(h-l) * scale
// backward, with `inside` where neither clip holds:
//   grad_w = grad * [inside],  grad_scale = sum of grad * (W_l * 2^(h-l) - v * [inside])
// each sum in an order that depends on the shape alone.
#pragma once

#include "bits/fake_quantize.h"

namespace tranche {

struct BitsFakeQuantizeParams {
  const void* w;      // [rows, groups, group_size]
  const void* scale;  // [rows, groups]: float, or double where w is
  const void* grad;   // as w; null forward
  void* out;          // as w: the weights, or their gradient
  void* grad_scale;   // as scale; null forward

  int64_t rows, groups, group_size;
  int32_t bits, stored_bits;
  DType type;  // of w, grad and out
};

namespace cpu {
void bits_fake_quantize(const BitsFakeQuantizeParams&);
}  // namespace cpu

namespace cuda {
void bits_fake_quantize(const BitsFakeQuantizeParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
