// Activations on the unsigned grid of b bits in floating point, and the way back.
//
//   v = (x - zero) / scale,  q = clip(round(v), 0, 2^b - 1),  out = q * scale + zero
// backward, with `inside` where the clip does not hold:
//   grad_x = grad * [inside],  grad_scale = sum of grad * (q - v * [inside]),  grad_zero = sum of grad *
//   [outside]
// Sums are over chunks of fixed size, added in order.
#pragma once

#include "bits/fake_quantize.h"

namespace tranche {

constexpr int64_t kFakeChunk = 8192;  // elements

struct BitsFakeQuantizeActivationsParams {
  const void* x;      // [count]
  const void* scale;  // one float, or double where x is
  const void* zero;   // likewise, or null for 0
  const void* grad;   // as x; null forward
  void* out;          // as x: the activations, or their gradient
  void* partial;      // [chunks, 2] of double: a chunk's sums for scale and zero; null forward
  void* grad_scale;   // as scale; null forward
  void* grad_zero;    // as scale; null forward

  int64_t count, chunks;
  int32_t bits;
  DType type;  // of x, grad and out
};

namespace cpu {
void bits_fake_quantize_activations(const BitsFakeQuantizeActivationsParams&);
}  // namespace cpu

namespace cuda {
void bits_fake_quantize_activations(const BitsFakeQuantizeActivationsParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
