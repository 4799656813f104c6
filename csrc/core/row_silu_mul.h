// SiLU of a gate times a value, element by element: what a kernel of this op receives.
//
//   out = round(silu(gate) * up),  silu(x) = x / (1 + exp(-x)),  in float
#pragma once

#include "core/numeric.h"

namespace tranche {

struct RowSiluMulParams {
  const void* gate;  // [rows, width], rows contiguous
  const void* up;    // likewise
  void* out;         // [rows, width], contiguous

  int64_t gate_stride, up_stride;  // of rows
  int64_t rows, width;
  DType type;
};

namespace cpu {
void row_silu_mul(const RowSiluMulParams&);
}  // namespace cpu

namespace cuda {
void row_silu_mul(const RowSiluMulParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
