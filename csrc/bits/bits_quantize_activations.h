// Per-token symmetric quantisation of activations: what a kernel of this op receives.
//
// In float, each operation rounded once, for a row x of K inputs:
//   a = max |x|,  scale = a / 127,  code = clamp(round_half_even(x * (127 / max(a, 2^-100))), -127, 127)
// A row with NaN or infinity gets scale NaN and codes 0: whatever is multiplied with it is NaN, and no other
// row is.
#pragma once

#include "core/numeric.h"

namespace tranche {

constexpr float kSmallestAbsmax = 7.888609052210118e-31f;  // 2^-100

struct BitsQuantizeActivationsParams {
  const void* x;     // [rows, inputs], rows contiguous; int8 (codes already) when x_is_codes
  int8_t* codes;     // out; see code_offset
  float* scale;      // [rows] out; null when x_is_codes
  int32_t* row_sum;  // [rows, groups] out: sums of the codes of a group

  int64_t x_stride;  // of rows
  int64_t rows, inputs;
  int64_t padded_rows, padded_inputs;  // codes beyond rows and inputs are written as zeros
  int64_t groups;                      // divides inputs
  int32_t tile_rows;  // 1: codes row by row; 16: tiles of 16 rows x 64 inputs, row tile by row tile
  DType x_type;
  bool x_is_codes;
};

// Where the code of an input lies. A tile's row is 64 codes, and padded_inputs a multiple of 64 where
// tile_rows is 16.
TRANCHE_HD int64_t code_offset(const BitsQuantizeActivationsParams& p, int64_t row, int64_t input) {
  if (p.tile_rows == 1) return row * p.padded_inputs + input;
  const int64_t tile = row / 16 * (p.padded_inputs / 64) + input / 64;
  return tile * 1024 + row % 16 * 64 + input % 64;
}

namespace cpu {
void bits_quantize_activations(const BitsQuantizeActivationsParams&);
}  // namespace cpu

namespace cuda {
void bits_quantize_activations(const BitsQuantizeActivationsParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
