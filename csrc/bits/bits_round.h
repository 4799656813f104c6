// Codes of 8 bits rounded to fewer: what a kernel of this op receives.
#pragma once

#include <cstdint>

namespace tranche {

struct BitsRoundParams {
  const int8_t* codes;  // [count]
  int8_t* out;          // [count]
  int64_t count;
  int32_t bits;
};

namespace cpu {
void bits_round(const BitsRoundParams&);
}  // namespace cpu

namespace cuda {
void bits_round(const BitsRoundParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
