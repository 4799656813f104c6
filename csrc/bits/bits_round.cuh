// One code a thread, strided over the grid.
#pragma once

#include "bits/bits_round.h"
#include "bits/packed.h"
#include "core/launch.cuh"

namespace tranche {

__global__ void __launch_bounds__(256) bits_round_kernel(BitsRoundParams p) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += step) {
    p.out[i] = int8_t(round_code(p.codes[i], p.bits));
  }
}

}  // namespace tranche
