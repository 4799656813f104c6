// One small kernel per rule of the simulator: what it must let pass, and what it must find. Unlike
// planted.cu, nothing here computes anything; tests/sim/test_rules.py says which are right and which are
// wrong.
#include <cstring>

#include "core/launch.cuh"
#include "core/ptx.cuh"

namespace tranche::rules {

struct Params {
  int32_t* data;  // 4096 elements, the second half of which is not registered
  int32_t* counter;
};

constexpr int kCount = 2048;
constexpr unsigned kAll = 0xffffffffu;

// ---- memory

__global__ void order(Params p) { p.data[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(p.counter, 1); }

__global__ void store_beyond_buffer(Params p) { p.data[kCount - 32 + threadIdx.x + (threadIdx.x == 31)] = 1; }

__global__ void load_beyond_buffer(Params p) {
  const int value = p.data[kCount - 32 + threadIdx.x + (threadIdx.x == 31)];
  if (value == 12345) p.data[0] = value;
}

__global__ void null_pointer(Params p) {
  int32_t* nowhere = p.data[0] == 0 ? nullptr : p.data;
  nowhere[1] = 1;
}

__global__ void store_beyond_dynamic_shared(Params p) {
  int32_t* shared = dynamic_smem<int32_t>();
  shared[threadIdx.x + 4096 - 31] = p.data[0];
}

__global__ void store_between_statics(Params p) {
  SHARED(int32_t, first, 32);
  SHARED(int32_t, second, 32);
  int32_t* into = first;
  into[threadIdx.x] = 1;
  second[threadIdx.x] = 2;
  into[threadIdx.x + 1 + p.data[0]] = 3;
}

__global__ void neighbours_in_a_word(Params p) {
  SHARED(uint8_t, bytes, 128);
  SHARED(uint16_t, halves, 128);
  bytes[threadIdx.x] = uint8_t(threadIdx.x);
  halves[threadIdx.x] = uint16_t(threadIdx.x);
  __syncthreads();
  const auto* words = reinterpret_cast<const uint16_t*>(&halves[0]);
  p.data[threadIdx.x] = bytes[127 - threadIdx.x] + words[127 - threadIdx.x];
}

__global__ void same_byte(Params p) {
  SHARED(uint8_t, bytes, 128);
  bytes[threadIdx.x / 2] = uint8_t(threadIdx.x);
  __syncthreads();
  p.data[threadIdx.x] = bytes[threadIdx.x / 2];
}

__global__ void every_thread_reads_all(Params p) {
  SHARED(int32_t, values, 128);
  values[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < 128; ++i) sum += values[i];
  __syncthreads();
  values[threadIdx.x] = sum;
  __syncthreads();
  p.data[threadIdx.x] = values[127 - threadIdx.x];
}

__global__ void write_after_others_read(Params p) {
  SHARED(int32_t, values, 128);
  values[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  const int mine = values[(threadIdx.x + 40) % 128];
  values[threadIdx.x] = mine;
  __syncthreads();
  p.data[threadIdx.x] = values[threadIdx.x];
}

__global__ void global_write_write(Params p) { p.data[threadIdx.x / 2] = int(threadIdx.x); }

__global__ void global_between_blocks(Params p) {
  p.data[threadIdx.x] = p.data[threadIdx.x] + int(blockIdx.x);
}

__global__ void global_in_place(Params p) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  p.data[i] = p.data[i] * 2 + 1;
}

__global__ void global_ordered_by_barrier(Params p) {
  p.data[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  __syncthreads();
  p.data[blockIdx.x * blockDim.x + blockDim.x - 1 - threadIdx.x] += 1;
}

__global__ void atomic_and_plain(Params p) {
  if (threadIdx.x == 0) {
    p.data[0] = 7;
  } else {
    atomicAdd(&p.data[0], 1);
  }
}

__global__ void shared_histogram(Params p) {
  SHARED(int32_t, bins, 8);
  if (threadIdx.x < 8) bins[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&bins[threadIdx.x % 8], 1);
  __syncthreads();
  if (threadIdx.x < 8) p.data[threadIdx.x] = bins[threadIdx.x];
}

__global__ void misaligned_atomic(Params p) {
  atomicAdd(reinterpret_cast<int*>(reinterpret_cast<char*>(p.data) + 2), 1);
}

__global__ void misaligned_copy(Params p) {
  int32_t* shared = dynamic_smem<int32_t>();
  ptx::cp_async_16(shared + threadIdx.x * 4, p.data + threadIdx.x * 4 + 1, true);
}

// A float array has a float's alignment, here as in CUDA.
__global__ void vector_in_static_shared(Params p) {
  SHARED(float, values, 128);
  *reinterpret_cast<float4*>(values + threadIdx.x * 4) = make_float4(0, 0, 0, 0);
  p.data[threadIdx.x] = int(values[threadIdx.x * 4]);
}

__global__ void other_threads_local(Params p) {
  SHARED(int32_t*, pointer, 1);
  int32_t mine[4] = {int(threadIdx.x), p.data[0], 2, 3};
  if (threadIdx.x == 0) pointer[0] = mine;
  __syncthreads();
  p.data[threadIdx.x] = pointer[0][threadIdx.x % 4];
  __syncthreads();
}

__global__ void ldmatrix_of_unwritten(Params p) {
  uint4* rows = dynamic_smem<uint4>();
  if (threadIdx.x < 31) rows[threadIdx.x] = make_uint4(1, 2, 3, 4);
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, rows + threadIdx.x);
  p.data[threadIdx.x] = int(r[0]);
}

// ---- warps

__global__ void warp_exchange(Params p) {
  SHARED(int32_t, values, 32);
  values[threadIdx.x] = int(threadIdx.x);
  __syncwarp();
  p.data[threadIdx.x] = values[31 - threadIdx.x];
}

// A shuffle makes lanes meet; it orders no memory.
__global__ void shuffle_is_no_barrier(Params p) {
  SHARED(int32_t, values, 32);
  values[threadIdx.x] = int(threadIdx.x);
  const int other = __shfl_xor_sync(kAll, 1, 1);
  p.data[threadIdx.x] = values[31 - threadIdx.x] + other;
}

__global__ void halves_sync_apart(Params p) {
  SHARED(int32_t, values, 32);
  const int lane = threadIdx.x;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  values[lane] = lane;
  __syncwarp(half);
  p.data[lane] = values[lane ^ 15];
}

__global__ void halves_sync_too_little(Params p) {
  SHARED(int32_t, values, 32);
  const int lane = threadIdx.x;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  values[lane] = lane;
  __syncwarp(half);
  p.data[lane] = values[lane ^ 16];
}

__global__ void branches_with_own_masks(Params p) {
  const int lane = threadIdx.x;
  int value = lane;
  if (lane % 2 == 0) {
    value = __shfl_xor_sync(0x55555555u, value, 2);
  } else {
    value = __shfl_xor_sync(0xaaaaaaaau, value, 4);
  }
  __syncwarp();
  p.data[lane] = value;
}

__global__ void masks_disagree(Params p) {
  const unsigned mask = threadIdx.x == 3 ? 0x7fffffffu : kAll;
  p.data[threadIdx.x] = __shfl_xor_sync(mask, 1, 1);
}

__global__ void operations_disagree(Params p) {
  int value = 0;
  if (threadIdx.x % 2 == 0) {
    value = __any_sync(kAll, 1);
  } else {
    value = __all_sync(kAll, 1);
  }
  p.data[threadIdx.x] = value;
}

__global__ void not_in_own_mask(Params p) { p.data[threadIdx.x] = __any_sync(0x7fffffffu, 1); }

__global__ void shuffle_from_outside_mask(Params p) {
  if (threadIdx.x < 16) p.data[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 16);
}

__global__ void odd_width(Params p) { p.data[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1, 12); }

__global__ void syncwarp_after_exit(Params p) {
  if (threadIdx.x >= 20) return;
  p.data[threadIdx.x] = 1;
  __syncwarp();
  p.data[19 - threadIdx.x] = 2;
}

__global__ void mma_after_exit(Params p) {
  if (threadIdx.x == 31) return;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  ptx::mma_m16n8k16<bf16>(d, a, b);
  p.data[threadIdx.x] = int(d[0]);
}

// ---- blocks

__global__ void barrier_after_exit(Params p) {
  SHARED(int32_t, values, 128);
  if (threadIdx.x >= 100) return;
  values[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  p.data[threadIdx.x] = values[99 - threadIdx.x];
}

__global__ void barriers_differ(Params p) {
  if (threadIdx.x < 64) {
    __syncthreads();
    p.data[0] = 1;
  } else {
    __syncthreads();
    p.data[64] = 1;
  }
}

__global__ void waits_for_ever(Params p) {
  if (threadIdx.x < 32) ptx::named_barrier_sync(1, 64);
  p.data[threadIdx.x] = 1;
}

__global__ void one_barrier_too_few(Params p) {
  SHARED(int32_t, values, 64);
  for (int round = 0; round < 3; ++round) {
    values[threadIdx.x] = round;
    __syncthreads();
    p.data[threadIdx.x] = values[63 - threadIdx.x];
  }
}

__global__ void named_barrier_handover(Params p) {
  SHARED(int32_t, values, 32);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    values[lane] = lane;
    ptx::named_barrier_arrive(3, 64);
  } else if (threadIdx.x < 64) {
    ptx::named_barrier_sync(3, 64);
    p.data[lane] = values[31 - lane];
  }
}

// The third warp did not take part.
__global__ void named_barrier_of_others(Params p) {
  SHARED(int32_t, values, 32);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) values[lane] = lane;
  if (threadIdx.x < 64) ptx::named_barrier_sync(3, 64);
  if (threadIdx.x >= 64) p.data[lane] = values[31 - lane];
}

// ---- between blocks

// Where the fence stands: 0 each thread before the barrier, 1 thread 0 after it, 2 nowhere, 3 after the
// atomic.
template <int fence>
__global__ void last_block(Params p) {
  SHARED(int32_t, last, 1);
  const int threads = blockDim.x, blocks = gridDim.x;
  p.data[blockIdx.x * threads + threadIdx.x] = 1;
  if (fence == 0 || (fence == 4 && threadIdx.x == 0)) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (fence == 1) __threadfence();
    last[0] = atomicAdd(p.counter, 1) == blocks - 1;
    if constexpr (fence == 3) __threadfence();
  }
  __syncthreads();
  if (!last[0]) return;
  int sum = 0;
  for (int i = 0; i < blocks; ++i) sum += p.data[i * threads + threadIdx.x];
  p.data[1024 + threadIdx.x] = sum;
  if (threadIdx.x == 0) *p.counter = 0;
}

// Block 0 raises a flag that the others poll.
__global__ void flag(Params p) {
  volatile int32_t* raised = p.counter;
  if (blockIdx.x == 0) {
    p.data[threadIdx.x] = 5;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *raised = 1;
  } else {
    if (threadIdx.x == 0) {
      while (*raised == 0) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
    p.data[256 + threadIdx.x] = p.data[threadIdx.x];
  }
}

__global__ void polls_for_ever(Params p) {
  volatile int32_t* raised = p.counter;
  while (*raised == 0) __nanosleep(20);
}

// ---- kernels that overlap

__global__ void overlap_waits(Params p) {
  SHARED(int32_t, ready, 32);
  ready[threadIdx.x] = int(threadIdx.x);  // what is its own needs no wait
  ptx::grid_dependency_wait();
  p.data[blockIdx.x * 32 + threadIdx.x] = ready[threadIdx.x];
  ptx::grid_launch_dependents();
}

__global__ void overlap_touches_too_early(Params p) {
  const int32_t value = p.data[threadIdx.x];
  ptx::grid_dependency_wait();
  p.data[threadIdx.x] = value + 1;
}

__global__ void overlap_ends_without_wait(Params p) {
  if (threadIdx.x % 2) return;
  ptx::grid_dependency_wait();
  p.data[threadIdx.x] = 1;
}

// ---- the unforeseen

__attribute__((noinline)) int deep(volatile int* data, int depth) {
  volatile int frame[64];
  frame[depth % 64] = depth;
  if (depth > 1 << 20) return frame[0];
  return deep(data, depth + 1) + frame[depth % 64];
}

__global__ void stack_overflow(Params p) { p.data[threadIdx.x] = deep(p.data, 0); }

__global__ void throws(Params p) {
  if (p.data[0] == 0) throw std::runtime_error("thrown in a kernel");
}

__global__ void traps(Params p) {
  if (p.data[0] == 0) __trap();
}

__global__ void divides_by_zero(Params p) { p.data[threadIdx.x] = 5 / p.data[threadIdx.x]; }

__global__ void shifts_too_far(Params p) { p.data[threadIdx.x] = 1 << (p.data[threadIdx.x] + 32); }

// ---- the table

struct Entry {
  const char* name;
  void (*kernel)(Params);
  int blocks, threads;
  bool overlaps = false;
};

#define ENTRY(kernel, blocks, threads) {#kernel, kernel, blocks, threads}

const Entry entries[] = {
    ENTRY(order, 4, 64),
    ENTRY(store_beyond_buffer, 1, 32),
    ENTRY(load_beyond_buffer, 1, 32),
    ENTRY(null_pointer, 1, 32),
    ENTRY(store_beyond_dynamic_shared, 1, 32),
    ENTRY(store_between_statics, 1, 32),
    ENTRY(neighbours_in_a_word, 1, 128),
    ENTRY(same_byte, 1, 128),
    ENTRY(every_thread_reads_all, 1, 128),
    ENTRY(write_after_others_read, 1, 128),
    ENTRY(global_write_write, 1, 64),
    ENTRY(global_between_blocks, 2, 64),
    ENTRY(global_in_place, 4, 64),
    ENTRY(global_ordered_by_barrier, 4, 64),
    ENTRY(atomic_and_plain, 1, 64),
    ENTRY(shared_histogram, 1, 128),
    ENTRY(misaligned_atomic, 1, 32),
    ENTRY(misaligned_copy, 1, 32),
    ENTRY(vector_in_static_shared, 1, 32),
    ENTRY(other_threads_local, 1, 64),
    ENTRY(ldmatrix_of_unwritten, 1, 32),
    ENTRY(warp_exchange, 1, 32),
    ENTRY(shuffle_is_no_barrier, 1, 32),
    ENTRY(halves_sync_apart, 1, 32),
    ENTRY(halves_sync_too_little, 1, 32),
    ENTRY(branches_with_own_masks, 1, 32),
    ENTRY(masks_disagree, 1, 32),
    ENTRY(operations_disagree, 1, 32),
    ENTRY(not_in_own_mask, 1, 32),
    ENTRY(shuffle_from_outside_mask, 1, 32),
    ENTRY(odd_width, 1, 32),
    ENTRY(syncwarp_after_exit, 1, 32),
    ENTRY(mma_after_exit, 1, 32),
    {"mma_of_a_part_warp", mma_after_exit, 1, 24},
    ENTRY(barrier_after_exit, 1, 128),
    ENTRY(barriers_differ, 1, 128),
    ENTRY(waits_for_ever, 1, 64),
    ENTRY(one_barrier_too_few, 1, 64),
    ENTRY(named_barrier_handover, 1, 96),
    ENTRY(named_barrier_of_others, 1, 96),
    {"last_block_all_fence", last_block<0>, 8, 64},
    {"last_block_one_fences", last_block<1>, 8, 64},
    {"last_block_without_fence", last_block<2>, 8, 64},
    {"last_block_fence_too_late", last_block<3>, 8, 64},
    {"last_block_fence_too_early", last_block<4>, 8, 64},
    ENTRY(flag, 2, 64),
    ENTRY(polls_for_ever, 1, 32),
    {"overlap_waits", overlap_waits, 2, 32, true},
    {"overlap_touches_too_early", overlap_touches_too_early, 1, 32, true},
    {"overlap_ends_without_wait", overlap_ends_without_wait, 1, 32, true},
    ENTRY(stack_overflow, 1, 32),
    ENTRY(throws, 1, 32),
    ENTRY(traps, 1, 32),
    ENTRY(divides_by_zero, 1, 32),
    ENTRY(shifts_too_far, 1, 32),
};

}  // namespace tranche::rules

// Runs a kernel; what was found is the simulator's last report. 0 if there is none of that name.
extern "C" __attribute__((visibility("default"))) int tranche_rule(const char* name, int32_t* data,
                                                                   int32_t* counter) {
  for (const auto& entry : tranche::rules::entries) {
    if (strcmp(entry.name, name) != 0) continue;
    const tranche::LaunchShape shape{dim3(unsigned(entry.blocks)), dim3(unsigned(entry.threads)), 16384,
                                     entry.overlaps};
    try {
      tranche::launch(name, entry.kernel, shape, nullptr, tranche::rules::Params{data, counter});
    } catch (const std::exception&) {
    }
    return 1;
  }
  return 0;
}

extern "C" __attribute__((visibility("default"))) const char* tranche_rule_names() {
  static const std::string names = [] {
    std::string text;
    for (const auto& entry : tranche::rules::entries) text += std::string(entry.name) + "\n";
    return text;
  }();
  return names.c_str();
}
