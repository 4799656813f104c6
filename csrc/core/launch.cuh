// How kernels are written and launched, on a GPU and in the simulator alike. A kernel source uses CUDA's own
// words (__global__, __syncthreads, __shfl_xor_sync, threadIdx...) and, in place of what a host compiler
// cannot parse, the few macros and functions of this file and of ptx.cuh.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/numeric.h"

#if defined(TRANCHE_SIM)
#include "sim/cuda.h"
#else
#include <cuda_runtime.h>
#endif

namespace tranche {

// What one launch asks for; blocks and threads as CUDA counts them.
struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t dynamic_smem = 0;  // bytes
  // Programmatic dependent launch: the kernel may start while the one before it on the stream still runs.
  // Every thread of it must call ptx::grid_dependency_wait() before it touches global memory or ends. Where
  // device or code knows nothing of this (before sm_90) the launch is an ordinary one, and the wait is
  // nothing.
  bool overlaps_previous = false;
};

// What the current device offers to a launch that stays on it.
struct DeviceLimits {
  int processors;
  size_t shared;  // bytes of shared memory that a block may have
};

#if defined(TRANCHE_SIM)

// Few processors, so that a block that stays has several things to do.
inline DeviceLimits device_limits() { return {2, size_t(227) << 10}; }

template <class Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, void* /*stream*/,
            const Params& params) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  sim::launch(name, shape.grid, shape.block, shape.dynamic_smem, shape.overlaps_previous,
              [&] { kernel(params); });
}

#else

// A block's static shared memory: SHARED(float, sums, 32) declares float sums[32].
#define SHARED(T, name, count) __shared__ T name[count]

// The block's dynamic shared memory, 128-byte aligned.
template <class T>
__device__ __forceinline__ T* dynamic_smem() {
  extern __shared__ __align__(128) unsigned char tranche_dynamic_smem[];
  return reinterpret_cast<T*>(tranche_dynamic_smem);
}

inline void check_cuda(cudaError_t status, const char* kernel, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("tranche: ") + what + " of kernel " + kernel +
                           " failed: " + cudaGetErrorString(status));
}

inline DeviceLimits device_limits() {
  int device = 0, processors = 0, shared = 0;
  const char* what = "the look at the device";
  check_cuda(cudaGetDevice(&device), "any", what);
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "any", what);
  check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "any", what);
  return {processors, size_t(shared)};
}

// Whether the code that the device would run waits where the source says so.
inline bool can_overlap(const void* kernel, const char* name) {
  cudaFuncAttributes code{};
  check_cuda(cudaFuncGetAttributes(&code, kernel), name, "the look at the code");
  return code.ptxVersion >= 90 && code.binaryVersion >= 90;
}

// The one place where a kernel is launched. An empty grid is no launch; a launch that the device refuses
// throws and names the kernel.
template <class Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape, void* stream,
            const Params& params) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  if (shape.grid.y > 65535 || shape.grid.z > 65535 || shape.block.x * shape.block.y * shape.block.z > 1024) {
    throw std::runtime_error(std::string("tranche: kernel ") + name +
                             ": grid or block exceeds CUDA's limits");
  }
  if (shape.dynamic_smem > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.dynamic_smem)),
               name, "the request for shared memory");
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.dynamic_smem;
  config.stream = static_cast<cudaStream_t>(stream);
  if (shape.overlaps_previous && can_overlap(reinterpret_cast<const void*>(kernel), name)) {
    config.attrs = &overlap;
    config.numAttrs = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), name, "the launch");
}

#endif

}  // namespace tranche
