// The arithmetic limit of a machine: independent chains of its best multiply-add instruction on registers,
// and nothing else. Benchmarks run it beside each row.
#pragma once

#include <cstdint>

namespace tranche {

enum class MathKind : int32_t {
  fp32,  // fused multiply-add
  bf16,  // products of bf16 pairs or tiles summed in fp32
  int8,  // products of int8 summed in int32
};

struct LimitMathParams {
  double*
      results;  // [parts, 2] operations done (a multiply-add is two), and a checksum that keeps them alive
  int64_t iterations;
  int32_t parts;
  MathKind kind;
};

namespace cpu {
void limit_math(const LimitMathParams&);
}

namespace cuda {
void limit_math(const LimitMathParams&, void* stream);
}

}  // namespace tranche
