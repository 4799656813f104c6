// Every primitive that our kernels use, alone in a kernel of its own. Built for the simulator and for the
// GPU, and run by tests/sim on random data against an independent model: the two must do the same.
//
// All kernels share one Params; thread i of the launch handles element i. Names in the table at the end are
// those that the tests ask for.
#include <cstring>

#include "core/launch.cuh"
#include "core/ptx.cuh"

namespace tranche::conformance {

struct Params {
  const void* a;
  const void* b;
  const void* c;
  void* out;
  int32_t n;         // elements
  int32_t argument;  // width, variant...
  uint32_t mask;     // lanes that take part in a collective
  uint32_t grid[3], block[3];
};

__device__ __forceinline__ int global_thread() { return int(blockIdx.x * blockDim.x + threadIdx.x); }
__device__ __forceinline__ bool takes_part(const Params& p) { return p.mask >> (threadIdx.x % 32) & 1; }

template <class T>
__device__ __forceinline__ const T* in_a(const Params& p) {
  return static_cast<const T*>(p.a);
}
template <class T>
__device__ __forceinline__ const T* in_b(const Params& p) {
  return static_cast<const T*>(p.b);
}
template <class T>
__device__ __forceinline__ const T* in_c(const Params& p) {
  return static_cast<const T*>(p.c);
}
template <class T>
__device__ __forceinline__ T* out_as(const Params& p) {
  return static_cast<T*>(p.out);
}

// ---- asynchronous copies and shared memory

// out[i] = valid[i] ? a[i] : 0, through shared memory, in two groups: the odd chunks are waited for last.
template <int bytes>
__global__ void cp_async(Params p) {
  unsigned char* tile = dynamic_smem<unsigned char>();
  const int t = threadIdx.x, size = blockDim.x;
  const int64_t first = int64_t(blockIdx.x) * size * 2;
  for (int group = 0; group < 2; ++group) {
    const int64_t i = first + group * size + t;
    const bool valid = in_b<int32_t>(p)[i] != 0;
    const auto* from = in_a<unsigned char>(p) + (valid ? i : 0) * bytes;
    if constexpr (bytes == 16) {
      ptx::cp_async_16(tile + (group * size + t) * bytes, from, valid);
    } else {
      ptx::cp_async_4(tile + (group * size + t) * bytes, from, valid);
    }
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  __syncthreads();
  // Another thread's chunk, so that the barrier matters.
  const int other = size - 1 - t;
  auto* out = out_as<uint32_t>(p);
  for (int w = 0; w < bytes / 4; ++w) {
    out[(first + other) * (bytes / 4) + w] = reinterpret_cast<const uint32_t*>(tile + other * bytes)[w];
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int w = 0; w < bytes / 4; ++w) {
    out[(first + size + other) * (bytes / 4) + w] =
        reinterpret_cast<const uint32_t*>(tile + (size + other) * bytes)[w];
  }
}

__global__ void load_streaming(Params p) {
  const int i = global_thread();
  if (i < p.n) out_as<uint4>(p)[i] = ptx::load_streaming_16(in_a<uint4>(p) + i);
}

// out[block][i] = a[block][n - 1 - i], half of the elements through static and half through dynamic shared
// memory.
__global__ void shared_memory(Params p) {
  SHARED(int32_t, fixed, 64);
  int32_t* dynamic = dynamic_smem<int32_t>();
  const int t = threadIdx.x, size = blockDim.x;
  const int32_t value = in_a<int32_t>(p)[global_thread()];
  if (t < 64) {
    fixed[t] = value;
  } else {
    dynamic[t - 64] = value;
  }
  __syncthreads();
  const int from = size - 1 - t;
  out_as<int32_t>(p)[global_thread()] = from < 64 ? fixed[from] : dynamic[from - 64];
}

// The even warps produce, the odd ones consume; out = a of the warp before, one round per element of a.
__global__ void named_barriers(Params p) {
  SHARED(int32_t, slot, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int round = 0; round < p.n; ++round) {
    if (warp == 0) {
      ptx::named_barrier_sync(1, 64);  // the slot is empty
      slot[lane] = in_a<int32_t>(p)[round * 32 + lane];
      ptx::named_barrier_arrive(2, 64);  // the slot is full
    } else {
      ptx::named_barrier_arrive(1, 64);
      ptx::named_barrier_sync(2, 64);
      out_as<int32_t>(p)[round * 32 + lane] = slot[31 - lane];
    }
  }
}

// ---- matrices

// a: 32 rows of 16 bytes; b: which of them each lane names; out[lane][register].
template <int matrices, bool transposed>
__global__ void ldmatrix(Params p) {
  uint4* rows = dynamic_smem<uint4>();
  const int lane = threadIdx.x;
  rows[lane] = in_a<uint4>(p)[lane];
  __syncwarp();
  const void* row = rows + in_b<int32_t>(p)[lane];
  uint32_t r[matrices];
  if constexpr (matrices == 4) {
    transposed ? ptx::ldmatrix_x4_trans(r, row) : ptx::ldmatrix_x4(r, row);
  } else {
    transposed ? ptx::ldmatrix_x2_trans(r, row) : ptx::ldmatrix_x2(r, row);
  }
  for (int i = 0; i < matrices; ++i) out_as<uint32_t>(p)[lane * matrices + i] = r[i];
}

// a[lane][4 or 2], b[lane][2 or 1], c[lane][4] are registers, as is out[lane][4]; one warp per block.
template <class T, class Accumulator, int k>
__global__ void mma(Params p) {
  constexpr int a_registers = 16 * k * int(sizeof(T)) / 128, b_registers = a_registers / 2;
  const int i = global_thread();
  uint32_t a[a_registers], b[b_registers];
  Accumulator d[4];
  for (int j = 0; j < a_registers; ++j) a[j] = in_a<uint32_t>(p)[i * a_registers + j];
  for (int j = 0; j < b_registers; ++j) b[j] = in_b<uint32_t>(p)[i * b_registers + j];
  for (int j = 0; j < 4; ++j) d[j] = in_c<Accumulator>(p)[i * 4 + j];
  if constexpr (k == 32) {
    ptx::mma_m16n8k32<T>(d, a, b);
  } else if constexpr (k == 16 && b_registers == 2) {
    ptx::mma_m16n8k16<T>(d, a, b);
  } else if constexpr (k == 16) {
    ptx::mma_m16n8k16<T>(d, a, b[0]);
  } else {
    ptx::mma_m16n8k8<T>(d, a, b[0]);
  }
  for (int j = 0; j < 4; ++j) out_as<Accumulator>(p)[i * 4 + j] = d[j];
}

// ---- lanes together

enum class Shuffle { index, up, down, exclusive_or };

template <class T, Shuffle kind>
__global__ void shuffle(Params p) {
  const int i = global_thread();
  if (!takes_part(p)) return;
  const T value = in_a<T>(p)[i];
  const int argument = in_b<int32_t>(p)[i], width = p.argument;
  T result;
  if constexpr (kind == Shuffle::index) result = __shfl_sync(p.mask, value, argument, width);
  if constexpr (kind == Shuffle::up) result = __shfl_up_sync(p.mask, value, argument, width);
  if constexpr (kind == Shuffle::down) result = __shfl_down_sync(p.mask, value, argument, width);
  if constexpr (kind == Shuffle::exclusive_or) result = __shfl_xor_sync(p.mask, value, argument, width);
  out_as<T>(p)[i] = result;
}

// out[i] = {ballot, all, any} of a[i]
__global__ void vote(Params p) {
  const int i = global_thread();
  if (!takes_part(p)) return;
  const int predicate = in_a<int32_t>(p)[i];
  auto* out = out_as<uint32_t>(p) + i * 3;
  out[0] = __ballot_sync(p.mask, predicate);
  out[1] = __all_sync(p.mask, predicate) != 0;
  out[2] = __any_sync(p.mask, predicate) != 0;
}

// out[i] = {match_any, match_all, its predicate} of a[i]
template <class T>
__global__ void match(Params p) {
  const int i = global_thread();
  if (!takes_part(p)) return;
  const T value = in_a<T>(p)[i];
  auto* out = out_as<uint32_t>(p) + i * 3;
  int agreed = -1;
  out[0] = __match_any_sync(p.mask, value);
  out[1] = __match_all_sync(p.mask, value, &agreed);
  out[2] = uint32_t(agreed != 0);
}

// out[i] = {add, min, max, signed add, min, max, and, or, xor} over the mask
__global__ void reduce(Params p) {
  const int i = global_thread();
  if (!takes_part(p)) return;
  const uint32_t u = in_a<uint32_t>(p)[i];
  const int s = int(u);
  auto* out = out_as<uint32_t>(p) + i * 9;
  out[0] = __reduce_add_sync(p.mask, u);
  out[1] = __reduce_min_sync(p.mask, u);
  out[2] = __reduce_max_sync(p.mask, u);
  out[3] = uint32_t(__reduce_add_sync(p.mask, s));
  out[4] = uint32_t(__reduce_min_sync(p.mask, s));
  out[5] = uint32_t(__reduce_max_sync(p.mask, s));
  out[6] = __reduce_and_sync(p.mask, u);
  out[7] = __reduce_or_sync(p.mask, u);
  out[8] = __reduce_xor_sync(p.mask, u);
}

// out[i] = {count, and, or} of a over the block
__global__ void block_vote(Params p) {
  const int i = global_thread();
  const int predicate = in_a<int32_t>(p)[i];
  auto* out = out_as<int32_t>(p) + i * 3;
  out[0] = __syncthreads_count(predicate);
  out[1] = __syncthreads_and(predicate) != 0;
  out[2] = __syncthreads_or(predicate) != 0;
}

// ---- atomics

enum class Atomic {
  add,
  min,
  max,
  exchange,
  bit_and,
  bit_or,
  bit_xor,
  increment,
  decrement,
  compare_exchange
};

// Thread i applies a[i] to cell b[i] of out; what it got back goes to c's place (out + argument).
template <class T, Atomic kind>
__global__ void atomic(Params p) {
  const int i = global_thread();
  if (i >= p.n) return;
  T* cell = out_as<T>(p) + in_b<int32_t>(p)[i];
  const T value = in_a<T>(p)[i];
  T old{};
  if constexpr (kind == Atomic::add) old = atomicAdd(cell, value);
  if constexpr (kind == Atomic::exchange) old = atomicExch(cell, value);
  if constexpr (kind == Atomic::compare_exchange) old = atomicCAS(cell, T(0), value);
  if constexpr (!std::is_floating_point_v<T>) {
    if constexpr (kind == Atomic::min) old = atomicMin(cell, value);
    if constexpr (kind == Atomic::max) old = atomicMax(cell, value);
    if constexpr (kind == Atomic::bit_and) old = atomicAnd(cell, value);
    if constexpr (kind == Atomic::bit_or) old = atomicOr(cell, value);
    if constexpr (kind == Atomic::bit_xor) old = atomicXor(cell, value);
  }
  if constexpr (std::is_same_v<T, unsigned>) {
    if constexpr (kind == Atomic::increment) old = atomicInc(cell, value);
    if constexpr (kind == Atomic::decrement) old = atomicDec(cell, value);
  }
  (out_as<T>(p) + p.argument)[i] = old;
}

// ---- element by element

enum class Map {
  popc,
  popcll,
  ffs,
  ffsll,
  clz,
  clzll,
  brev,
  byte_perm,
  funnel_l,
  funnel_r,
  umulhi,
  mulhi,
  dp4a_s,
  dp4a_u,
  min_s,
  max_u,
  min_f,
  max_f,
  fma,
  to_int_rn,
  to_int_rz,
  to_int_rd,
  to_int_ru,
  saturate,
  mul,
  exp2_approx,
  log2_approx,
  reciprocal_approx,
  opaque,
  pack_bf16,
  pack_half,
  half_to_float,
  bf16_to_float,
  e4m3_to_float,
  float_to_half,
  float_to_bf16,
  float_to_e4m3,
};

template <Map kind>
__device__ __forceinline__ uint32_t map_bits(uint32_t a, uint32_t b, uint32_t c, unsigned long long wide) {
  if constexpr (kind == Map::popc) return uint32_t(__popc(a));
  if constexpr (kind == Map::popcll) return uint32_t(__popcll(wide));
  if constexpr (kind == Map::ffs) return uint32_t(__ffs(int(a)));
  if constexpr (kind == Map::ffsll) return uint32_t(__ffsll((long long)(wide)));
  if constexpr (kind == Map::clz) return uint32_t(__clz(int(a)));
  if constexpr (kind == Map::clzll) return uint32_t(__clzll((long long)(wide)));
  if constexpr (kind == Map::brev) return __brev(a);
  if constexpr (kind == Map::byte_perm) return __byte_perm(a, b, c);
  if constexpr (kind == Map::funnel_l) return __funnelshift_l(a, b, c);
  if constexpr (kind == Map::funnel_r) return __funnelshift_r(a, b, c);
  if constexpr (kind == Map::umulhi) return __umulhi(a, b);
  if constexpr (kind == Map::mulhi) return uint32_t(__mulhi(int(a), int(b)));
  if constexpr (kind == Map::dp4a_s) return uint32_t(__dp4a(int(a), int(b), int(c)));
  if constexpr (kind == Map::dp4a_u) return __dp4a(a, b, c);
  if constexpr (kind == Map::min_s) return uint32_t(min(int(a), int(b)));
  if constexpr (kind == Map::max_u) return max(a, b);
  const float x = __uint_as_float(a), y = __uint_as_float(b), z = __uint_as_float(c);
  if constexpr (kind == Map::min_f) return __float_as_uint(min(x, y));
  if constexpr (kind == Map::max_f) return __float_as_uint(max(x, y));
  if constexpr (kind == Map::fma) return __float_as_uint(__fmaf_rn(x, y, z));
  if constexpr (kind == Map::to_int_rn) return uint32_t(__float2int_rn(x));
  if constexpr (kind == Map::to_int_rz) return uint32_t(__float2int_rz(x));
  if constexpr (kind == Map::to_int_rd) return uint32_t(__float2int_rd(x));
  if constexpr (kind == Map::to_int_ru) return uint32_t(__float2int_ru(x));
  if constexpr (kind == Map::saturate) return __float_as_uint(__saturatef(x));
  if constexpr (kind == Map::mul) return __float_as_uint(ptx::mul(x, y));
  if constexpr (kind == Map::exp2_approx) return __float_as_uint(ptx::exp2_approx(x));
  if constexpr (kind == Map::log2_approx) return __float_as_uint(ptx::log2_approx(x));
  if constexpr (kind == Map::reciprocal_approx) return __float_as_uint(ptx::reciprocal_approx(x));
  if constexpr (kind == Map::opaque) return uint32_t(ptx::opaque(int(a)));
  if constexpr (kind == Map::pack_bf16) return ptx::pack<bf16>(x, y);
  if constexpr (kind == Map::pack_half) return ptx::pack<half>(x, y);
  if constexpr (kind == Map::half_to_float) return float_bits(to_float(half{uint16_t(a)}));
  if constexpr (kind == Map::bf16_to_float) return float_bits(to_float(bf16{uint16_t(a)}));
  if constexpr (kind == Map::e4m3_to_float) return float_bits(to_float(e4m3{uint8_t(a)}));
  if constexpr (kind == Map::float_to_half) return from_float<half>(x).bits;
  if constexpr (kind == Map::float_to_bf16) return from_float<bf16>(x).bits;
  return from_float<e4m3>(x).bits;
}

template <Map kind>
__global__ void map(Params p) {
  const int i = global_thread();
  if (i >= p.n) return;
  const uint32_t a = in_a<uint32_t>(p)[i], b = in_b<uint32_t>(p)[i], c = in_c<uint32_t>(p)[i];
  out_as<uint32_t>(p)[i] = map_bits<kind>(a, b, c, (unsigned long long)(b) << 32 | a);
}

// out[linear thread of the linear block] = {thread, block, block shape, grid shape}, three numbers each
__global__ void indices(Params p) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  uint32_t* out = out_as<uint32_t>(p) + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 12;
  const uint32_t values[12] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z,
                               blockDim.x,  blockDim.y,  blockDim.z,  gridDim.x,  gridDim.y,  gridDim.z};
  for (int i = 0; i < 12; ++i) out[i] = values[i];
}

// ---- the table

// ---- kernels that overlap on a stream

// The first kernel lets the second start and only then, after a while, writes out[i] = a[i]; the second waits
// and adds what it finds at the other end.
__global__ void overlapped(Params p) {
  ptx::grid_launch_dependents();
  const int i = global_thread();
  uint32_t value = in_a<uint32_t>(p)[i];
  for (int n = 0; n < p.argument; ++n) value = value * 1664525u + 1013904223u;
  out_as<uint32_t>(p)[i] = value;
}

__global__ void overlapping(Params p) {
  ptx::grid_dependency_wait();
  const int i = global_thread();
  out_as<uint32_t>(p)[p.n + i] = out_as<uint32_t>(p)[p.n - 1 - i] + 1u;
}

struct Entry {
  const char* name;
  void (*kernel)(Params);
  void (*next)(Params) = nullptr;  // launched after it, to overlap
};

#define MAP(kind) {#kind, map<Map::kind>}
#define SHUFFLE(name, T)                                                                              \
  {"shuffle_index_" name, shuffle<T, Shuffle::index>}, {"shuffle_up_" name, shuffle<T, Shuffle::up>}, \
      {"shuffle_down_" name, shuffle<T, Shuffle::down>}, {                                            \
    "shuffle_xor_" name, shuffle<T, Shuffle::exclusive_or>                                            \
  }
#define ATOMIC(name, T)                                                                                     \
  {"atomic_add_" name, atomic<T, Atomic::add>}, {"atomic_min_" name, atomic<T, Atomic::min>},               \
      {"atomic_max_" name, atomic<T, Atomic::max>}, {"atomic_exchange_" name, atomic<T, Atomic::exchange>}, \
      {"atomic_and_" name, atomic<T, Atomic::bit_and>}, {"atomic_or_" name, atomic<T, Atomic::bit_or>},     \
      {"atomic_xor_" name, atomic<T, Atomic::bit_xor>}, {                                                   \
    "atomic_compare_exchange_" name, atomic<T, Atomic::compare_exchange>                                    \
  }

const Entry entries[] = {
    {"cp_async_16", cp_async<16>},
    {"cp_async_4", cp_async<4>},
    {"load_streaming_16", load_streaming},
    {"grid_dependency", overlapped, overlapping},
    {"shared_memory", shared_memory},
    {"named_barriers", named_barriers},
    {"ldmatrix_x4", ldmatrix<4, false>},
    {"ldmatrix_x4_trans", ldmatrix<4, true>},
    {"ldmatrix_x2", ldmatrix<2, false>},
    {"ldmatrix_x2_trans", ldmatrix<2, true>},
    {"mma_m16n8k16_bf16", mma<bf16, float, 16>},
    {"mma_m16n8k16_half", mma<half, float, 16>},
    {"mma_m16n8k8_bf16", mma<bf16, float, 8>},
    {"mma_m16n8k8_half", mma<half, float, 8>},
    {"mma_m16n8k32_s8", mma<int8_t, int32_t, 32>},
    {"mma_m16n8k32_u8", mma<uint8_t, int32_t, 32>},
    {"mma_m16n8k16_s8", mma<int8_t, int32_t, 16>},
    {"mma_m16n8k16_u8", mma<uint8_t, int32_t, 16>},
    SHUFFLE("u32", uint32_t),
    SHUFFLE("f32", float),
    SHUFFLE("u64", unsigned long long),
    {"vote", vote},
    {"match_u32", match<uint32_t>},
    {"match_u64", match<unsigned long long>},
    {"reduce", reduce},
    {"block_vote", block_vote},
    ATOMIC("u32", unsigned),
    ATOMIC("s32", int),
    ATOMIC("u64", unsigned long long),
    {"atomic_add_f32", atomic<float, Atomic::add>},
    {"atomic_increment_u32", atomic<unsigned, Atomic::increment>},
    {"atomic_decrement_u32", atomic<unsigned, Atomic::decrement>},
    MAP(popc),
    MAP(popcll),
    MAP(ffs),
    MAP(ffsll),
    MAP(clz),
    MAP(clzll),
    MAP(brev),
    MAP(byte_perm),
    MAP(funnel_l),
    MAP(funnel_r),
    MAP(umulhi),
    MAP(mulhi),
    MAP(dp4a_s),
    MAP(dp4a_u),
    MAP(min_s),
    MAP(max_u),
    MAP(min_f),
    MAP(max_f),
    MAP(fma),
    MAP(to_int_rn),
    MAP(to_int_rz),
    MAP(to_int_rd),
    MAP(to_int_ru),
    MAP(saturate),
    MAP(mul),
    MAP(exp2_approx),
    MAP(log2_approx),
    MAP(reciprocal_approx),
    MAP(opaque),
    MAP(pack_bf16),
    MAP(pack_half),
    MAP(half_to_float),
    MAP(bf16_to_float),
    MAP(e4m3_to_float),
    MAP(float_to_half),
    MAP(float_to_bf16),
    MAP(float_to_e4m3),
    {"indices", indices},
};

}  // namespace tranche::conformance

// Runs the kernel called `name` and waits for it. Returns "" or what went wrong; the text lives until the
// thread's next call.
extern "C" __attribute__((visibility("default"))) const char* tranche_conformance(
    const char* name, const tranche::conformance::Params* params) {
  static thread_local std::string error;
  error = "no primitive of this name: " + std::string(name);
  for (const auto& entry : tranche::conformance::entries) {
    if (strcmp(entry.name, name) != 0) continue;
    const auto& g = params->grid;
    const auto& b = params->block;
    const tranche::LaunchShape shape{dim3(g[0], g[1], g[2]), dim3(b[0], b[1], b[2]), 16384};
    error.clear();
    try {
      tranche::launch(name, entry.kernel, shape, nullptr, *params);
      if (entry.next) {
        tranche::LaunchShape overlapping = shape;
        overlapping.overlaps_previous = true;
        tranche::launch(name, entry.next, overlapping, nullptr, *params);
      }
#if !defined(TRANCHE_SIM)
      tranche::check_cuda(cudaDeviceSynchronize(), name, "the end");
#endif
    } catch (const std::exception& e) {
      error = e.what();
    }
  }
  return error.c_str();
}

// The names in the table, one a line.
extern "C" __attribute__((visibility("default"))) const char* tranche_conformance_names() {
  static const std::string names = [] {
    std::string text;
    for (const auto& entry : tranche::conformance::entries) text += std::string(entry.name) + "\n";
    return text;
  }();
  return names.c_str();
}
