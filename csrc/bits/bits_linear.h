// x times packed weights: what a kernel of bits_int_linear and bits_linear receives.
//
// The sums are over integers w = W_l * 2^(8-l), which fit 8 bits for every l, and are divided by 2^(8-l) only
// where integers are asked for. In float, each operation rounded once, groups in order:
//   integer activations:  y = (float(sum_0) * scale_0 + float(sum_1) * scale_1 + ...) * x_scale (+ bias)
//   weight-only:          y = total_0 * scale_0 + total_1 * scale_1 + ... (+ bias)
// where a group's total adds blocks of inputs in order, and a block is one chain of FMAs on the CPU: 32
// inputs, or 256 where x is bf16 and the instruction set multiplies pairs of those (AVX-512: x0 and x2, x1
// and x3 of every four; subnormal values count as zero).
#pragma once

#include "bits/bits_quantize_activations.h"
#include "bits/packed.h"

namespace tranche {

constexpr int kFloatBlock = 32, kBf16Block = 256;  // inputs

enum class LinearKind : int32_t {
  integers,     // x int8, out int32
  quantized,    // x float, quantised by row
  weight_only,  // x float
};

struct BitsLinearParams {
  PackedWeight w;
  const void* x;       // [rows, in_features], rows contiguous
  const float* scale;  // [out_features, groups]; null for integers
  const float* bias;   // [out_features], or null
  void* out;           // [rows, out_features]
  void* workspace;     // of bits_linear_workspace() bytes

  int64_t rows, x_stride;
  int64_t groups;
  LinearKind kind;
  DType type;  // of x and out; unused for integers
};

namespace cpu {
void bits_linear(const BitsLinearParams&);
int64_t bits_linear_workspace(const BitsLinearParams&);  // bytes
}  // namespace cpu

namespace cuda {
void bits_linear(const BitsLinearParams&, void* stream);
int64_t bits_linear_workspace(const BitsLinearParams&);
}  // namespace cuda

}  // namespace tranche
