// Root-mean-square normalisation of rows: what a kernel of this op receives.
//
// In float, for a row x of H elements:  r = 1 / sqrt(sum x^2 / H + epsilon),
//   out = round(weight * round(x * r)), each product rounded to the row's type
// The order of the sum is the kernel's, and the same for every row of the same H.
#pragma once

#include "core/numeric.h"

namespace tranche {

struct RowRmsNormParams {
  const void* x;       // [rows, width], rows contiguous
  const void* weight;  // [width], contiguous
  void* out;           // [rows, width], contiguous

  int64_t x_stride;  // of rows
  int64_t rows, width;
  float epsilon;
  DType type;
};

namespace cpu {
void row_rms_norm(const RowRmsNormParams&);
}  // namespace cpu

namespace cuda {
void row_rms_norm(const RowRmsNormParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
