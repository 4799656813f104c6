// The gates' function on CUDA.
#pragma once

#include "core/launch.cuh"

namespace tranche {

// NaN stays.
__device__ __forceinline__ float hardsigmoid(float x) {
  const float shifted = x + 3.0f;
  return (shifted < 0.0f ? 0.0f : shifted > 6.0f ? 6.0f : shifted) / 6.0f;
}

}  // namespace tranche
