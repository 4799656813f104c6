// The interface between kernels compiled for the simulator and its runtime library. Plain functions with C
// names, so that the library can hide everything else: were its std:: templates visible, the linker might
// give it the kernels' instrumented copies, and the runtime would end up checking itself.
//
// Nothing here is called by kernel authors: cuda.h and ptx.h dress these functions as CUDA's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sim/vector_types.h"

namespace tranche::sim {

// A place in a kernel's source. As a default argument, here() is the line of the caller.
struct Site {
  const char* file = nullptr;
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// What the lanes of a warp do together. Lanes meet when they agree on operation, mask and line.
enum class WarpOp : uint8_t {
  sync,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  all,
  any,
  match_any,
  match_all,
  reduce_add,
  reduce_min_u32,
  reduce_min_s32,
  reduce_max_u32,
  reduce_max_s32,
  reduce_and,
  reduce_or,
  reduce_xor,
  // From here on the whole warp must be alive, as ".sync.aligned" demands.
  ldmatrix,
  ldmatrix_trans,
  mma_m16n8k8_bf16,
  mma_m16n8k8_f16,
  mma_m16n8k16_bf16,
  mma_m16n8k16_f16,
  mma_m16n8k16_s8,
  mma_m16n8k16_u8,
  mma_m16n8k32_s8,
  mma_m16n8k32_u8,
};

enum class BlockOp : uint8_t { sync, count, all, any };

enum class AtomicOp : uint8_t {
  add,
  min,
  max,
  exchange,
  compare_exchange,
  bit_and,
  bit_or,
  bit_xor,
  increment,
  decrement
};

enum class AtomicType : uint8_t { s32, u32, s64, u64, f32, f64 };

struct Float4Result {
  float x, y, z, w;
};
struct Word4Result {
  uint64_t low, high;  // two 32-bit registers each
};

}  // namespace tranche::sim

#define TRANCHE_SIM_API extern "C" __attribute__((visibility("default")))

// Constant for as long as one simulated thread runs, hence the attribute: it saves calls, and it keeps index
// reads out of the instrumented memory traffic.
TRANCHE_SIM_API __attribute__((const)) uint3 tranche_sim_thread_index();
TRANCHE_SIM_API __attribute__((const)) uint3 tranche_sim_block_index();
TRANCHE_SIM_API __attribute__((const)) uint3 tranche_sim_block_shape();
TRANCHE_SIM_API __attribute__((const)) uint3 tranche_sim_grid_shape();

TRANCHE_SIM_API void tranche_sim_launch(const char* name, const uint3* grid, const uint3* block,
                                        size_t dynamic_smem, void (*body)(void*), void* context);
// The same of a kernel that may start while the one before it still runs.
TRANCHE_SIM_API void tranche_sim_launch_overlapping(const char* name, const uint3* grid, const uint3* block,
                                                    size_t dynamic_smem, void (*body)(void*), void* context);
TRANCHE_SIM_API void tranche_sim_grid_dependency_wait();
TRANCHE_SIM_API void* tranche_sim_static_shared(const void* declaration, const char* name, size_t bytes,
                                                size_t alignment);
TRANCHE_SIM_API void* tranche_sim_dynamic_shared();
TRANCHE_SIM_API uint32_t tranche_sim_shared_offset(const void* pointer, tranche::sim::Site site);

TRANCHE_SIM_API uint32_t tranche_sim_block_barrier(tranche::sim::BlockOp op, uint32_t predicate,
                                                   tranche::sim::Site site);
TRANCHE_SIM_API void tranche_sim_named_barrier(uint32_t id, uint32_t count, bool wait,
                                               tranche::sim::Site site);
TRANCHE_SIM_API uint64_t tranche_sim_warp(tranche::sim::WarpOp op, uint32_t mask, uint64_t value,
                                          uint32_t argument, uint32_t width, tranche::sim::Site site);
TRANCHE_SIM_API uint32_t tranche_sim_live_lanes();

TRANCHE_SIM_API tranche::sim::Word4Result tranche_sim_ldmatrix(tranche::sim::WarpOp op, uint32_t matrices,
                                                               const void* row, tranche::sim::Site site);
TRANCHE_SIM_API tranche::sim::Float4Result tranche_sim_mma_f32(uint32_t a0, uint32_t a1, uint32_t a2,
                                                               uint32_t a3, uint32_t b0, uint32_t b1,
                                                               float d0, float d1, float d2, float d3,
                                                               tranche::sim::WarpOp op,
                                                               tranche::sim::Site site);
TRANCHE_SIM_API tranche::sim::Word4Result tranche_sim_mma_s32(uint64_t a01, uint64_t a23, uint64_t b01,
                                                              uint64_t d01, uint64_t d23,
                                                              tranche::sim::WarpOp op,
                                                              tranche::sim::Site site);

TRANCHE_SIM_API void tranche_sim_copy_async(void* shared, const void* global, uint32_t bytes, bool valid,
                                            tranche::sim::Site site);
TRANCHE_SIM_API void tranche_sim_copy_async_commit();
TRANCHE_SIM_API void tranche_sim_copy_async_wait(uint32_t pending);
TRANCHE_SIM_API uint4 tranche_sim_load_16(const void* global, tranche::sim::Site site);

TRANCHE_SIM_API uint64_t tranche_sim_atomic(void* address, tranche::sim::AtomicOp op,
                                            tranche::sim::AtomicType type, uint64_t value, uint64_t compare,
                                            tranche::sim::Site site);
TRANCHE_SIM_API void tranche_sim_fence();
TRANCHE_SIM_API void tranche_sim_pause();
TRANCHE_SIM_API int64_t tranche_sim_clock();
TRANCHE_SIM_API void tranche_sim_trap(const char* what, tranche::sim::Site site);

// ---- for the code that launches, and for tests through ctypes

// Once a host thread has registered a buffer, kernels that it launches may touch registered buffers only.
TRANCHE_SIM_API void tranche_sim_register_buffer(const void* address, size_t bytes);
TRANCHE_SIM_API void tranche_sim_unregister_buffer(const void* address, size_t bytes);

// The seed of every later launch; the count of launches that is mixed into it starts again.
TRANCHE_SIM_API void tranche_sim_set_seed(uint64_t seed);
// 0 turns the checks of memory accesses off (collectives and deadlocks are always checked), 1 turns them on.
TRANCHE_SIM_API void tranche_sim_set_checks(int enabled);
// 1 switches fibers through ucontext instead of our assembly; returns what is in force afterwards.
TRANCHE_SIM_API int tranche_sim_use_ucontext(int enabled);
// What the last launch of this host thread found, or "" when it was clean.
TRANCHE_SIM_API const char* tranche_sim_last_report();

struct tranche_sim_counters {
  uint64_t launches, blocks, switches, collectives, mma, barriers, checked_accesses;
};
TRANCHE_SIM_API void tranche_sim_read_counters(tranche_sim_counters* out);

namespace tranche::sim {

// Runs `body` once for every thread of the grid; throws std::runtime_error with all findings.
template <class Body>
void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_smem, bool overlaps, Body&& body) {
  const uint3 grid_shape{grid.x, grid.y, grid.z}, block_shape{block.x, block.y, block.z};
  auto call = [](void* context) { (*static_cast<Body*>(context))(); };
  const auto run = overlaps ? tranche_sim_launch_overlapping : tranche_sim_launch;
  run(name, &grid_shape, &block_shape, dynamic_smem, call, &body);
}

// Registers a buffer for as long as it lives.
class Buffer {
 public:
  Buffer(const void* address, size_t bytes) : address_(address), bytes_(bytes) {
    tranche_sim_register_buffer(address_, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { tranche_sim_unregister_buffer(address_, bytes_); }

 private:
  const void* address_;
  size_t bytes_;
};

}  // namespace tranche::sim
