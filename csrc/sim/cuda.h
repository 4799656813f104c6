// CUDA's words for a host compiler: include this in place of <cuda_runtime.h>, and a kernel source compiles
// for the simulator. Each group of words has its own short file.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "sim/runtime.h"
#include "sim/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__
#define __align__(n) alignas(n)

// Indices are values, not variables: a thread's own cannot be written, and reading them is no memory access.
#define threadIdx (tranche_sim_thread_index())
#define blockIdx (tranche_sim_block_index())
#define blockDim (tranche_sim_block_shape())
#define gridDim (tranche_sim_grid_shape())
inline constexpr int warpSize = 32;

namespace tranche::sim {

template <class T, size_t count>
using Array = T[count];

}  // namespace tranche::sim

// A block's static shared memory. The declaration is known by the address of a constant of its own, so that
// every thread of the block, and every call of the function, gets the same place.
#define SHARED(T, name, count)                                                                \
  static const char tranche_shared_##name = 0;                                                \
  ::tranche::sim::Array<T, (count)>& name = *static_cast<::tranche::sim::Array<T, (count)>*>( \
      tranche_sim_static_shared(&tranche_shared_##name, #name, sizeof(T) * (count), alignof(T)))

namespace tranche {

template <class T>
T* dynamic_smem() {
  return static_cast<T*>(tranche_sim_dynamic_shared());
}

}  // namespace tranche

#include "sim/atomics.h"
#include "sim/intrinsics.h"
#include "sim/synchronization.h"
