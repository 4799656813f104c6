// Which tokens each expert serves, without a sort: what a kernel of this op receives.
#pragma once

#include <cstdint>

namespace tranche {

// Sizes: T tokens, K experts of each, E experts. Slot t * K + k is the k-th choice of token t.
//
// An id outside [0, E), which the op refuses on the cpu backend before a kernel runs, is left out.
struct MoePlanParams {
  const int32_t* ids;  // [T, K] contiguous
  int32_t* offsets;    // [E + 1] out: expert e serves slots[offsets[e]] .. slots[offsets[e + 1] - 1]
  int32_t* slots;      // [T * K] out: ascending within an expert; -1 from offsets[E] on

  int32_t count;  // T * K
  int32_t experts;
};

namespace cpu {
void moe_plan(const MoePlanParams&);
}  // namespace cpu

namespace cuda {
void moe_plan(const MoePlanParams&, void* stream);
}  // namespace cuda

}  // namespace tranche
