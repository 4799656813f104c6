// One kernel with everything that goes wrong in real ones, and every way to get it wrong: the simulator's own
// test. `bug` selects what is taken out or put in; bug 0 is the kernel as it should be.
//
// out[s, m, n] = sum over k of a[m, k] * w[table[k / 16], k % 16, n] with a and w in bf16, w in pages of 16
// rows reached through a table. Each of `splits` blocks takes a part of the pages through a ring of tiles in
// shared memory, leaves its partial sums in a workspace, and the block that arrives last adds them up in
// fixed order. Beside it, each split's row maxima of a are reduced through shuffles and shared memory.
#include "core/launch.cuh"
#include "core/ptx.cuh"

namespace tranche::planted {

enum Bug : int {
  none,
  barrier_removed,
  wait_removed,
  wait_too_weak,
  wait_after_barrier,
  tail_shared_off_by_one,
  tail_global_off_by_one,
  swapped_fragments,
  syncwarp_removed,
  reduction_race,
  page_overrun,
  wrong_shuffle_lane,
  collective_after_exit,
  partial_mask,
  uninitialised_shared,
  misaligned_vector,
  fence_removed,
  counter_not_atomic,
  divergent_barrier,
  ring_slot_reused,
  bug_count,
};

struct Params {
  const bf16* a;         // [M, K]
  const bf16* w;         // [pages, 16, 64]
  const int32_t* table;  // [K / 16]
  float* partial;        // [splits, M, 64]
  unsigned* counter;     // [ceil(M / 16)], zero before and after
  float* out;            // [M, 64]
  float* row_max;        // [splits, M]
  int64_t M, K;
  int32_t splits;
};

constexpr int kRows = 16, kColumns = 64, kPage = 16, kStages = 3, kThreads = 128;
constexpr int kStride = kColumns + 8;  // padded against bank conflicts
constexpr int kAStride = kPage + 8;

struct Tile {
  bf16 a[kRows][kAStride];
  bf16 w[kPage][kStride];
};
constexpr size_t kSharedBytes = kStages * sizeof(Tile);

// Copies page `page` of the sequence into a slot of the ring; rows beyond M are zeros.
template <int bug>
__device__ __forceinline__ void load_tile(const Params& p, Tile& tile, int64_t m0, int page) {
  const int t = threadIdx.x;
  if (t < kRows * 2) {
    const int row = t / 2, part = t % 2 * 8;
    const int64_t limit = bug == tail_global_off_by_one ? p.M + 1 : p.M;
    const bool valid = m0 + row < limit;
    const int64_t source = (valid ? m0 + row : 0) * p.K + page * kPage + part;
    ptx::cp_async_16(&tile.a[row][part], p.a + source, valid);
  }
  const int row = t / 8, part = t % 8 * 8;
  const int64_t w_row = int64_t(p.table[page]) * kPage + row + (bug == page_overrun ? 1 : 0);
  ptx::cp_async_16(&tile.w[row][part], p.w + w_row * kColumns + part, true);
}

template <int bug>
__global__ void __launch_bounds__(kThreads) paged_product(Params p) {
  Tile* ring = dynamic_smem<Tile>();
  SHARED(float, warp_max, kRows * 4);
  SHARED(float, staged, 4 * 32);
  SHARED(int32_t, is_last, 1);

  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  const int64_t m0 = int64_t(blockIdx.x) * kRows;
  const int pages = int(p.K / kPage), split = blockIdx.y;
  const int first = int(int64_t(pages) * split / p.splits),
            last = int(int64_t(pages) * (split + 1) / p.splits);

  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (first + stage < last) load_tile<bug>(p, ring[stage], m0, first + stage);
    ptx::cp_async_commit();
  }

  float d[2][4] = {};
  float largest = -INFINITY;
  for (int page = first; page < last; ++page) {
    if constexpr (bug == wait_removed) {
    } else if constexpr (bug == wait_too_weak) {
      ptx::cp_async_wait<kStages - 1>();
    } else if constexpr (bug != wait_after_barrier) {
      ptx::cp_async_wait<kStages - 2>();
    }
    if constexpr (bug == divergent_barrier) {
      if (lane < 16 || page == first) __syncthreads();
    } else if constexpr (bug != barrier_removed) {
      __syncthreads();
    }
    if constexpr (bug == wait_after_barrier) ptx::cp_async_wait<kStages - 2>();

    const Tile& tile = ring[(page - first) % kStages];
    const int next = page + kStages - 1;
    const int slot = bug == ring_slot_reused ? (page - first) % kStages : (next - first) % kStages;
    if (next < last) load_tile<bug>(p, ring[slot], m0, next);
    ptx::cp_async_commit();

    // Row r of A and the page's rows of W, as fragments; each warp has 16 of the 64 columns.
    uint32_t a[4], b[4];
    ptx::ldmatrix_x4(a, &tile.a[lane % 16][lane / 16 * 8]);
    ptx::ldmatrix_x4_trans(b, &tile.w[lane % 16][warp * 16 + lane / 16 * 8]);
    if constexpr (bug == swapped_fragments) {
      const uint32_t keep = a[1];
      a[1] = a[2];
      a[2] = keep;
    }
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
      const uint32_t pair[2] = {b[half_tile * 2], b[half_tile * 2 + 1]};
      ptx::mma_m16n8k16<bf16>(d[half_tile], a, pair);
    }
    // Thread t looks at two elements of row t / 8.
    const int column = t % 8 * 2;
    largest = fmaxf(largest, fmaxf(to_float(tile.a[t / 8][column]), to_float(tile.a[t / 8][column + 1])));
  }

  // Eight neighbouring lanes hold one row; lane 8 j then speaks for it.
  if constexpr (bug == collective_after_exit) {
    if (m0 + t / 8 >= p.M) return;
  }
  for (int step = 4; step > 0; step /= 2) {
    const int other = bug == wrong_shuffle_lane ? step * 2 : step;
    if constexpr (bug == partial_mask) {
      if (lane < 24) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
    } else {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
    }
  }
  if (lane % 8 == 0) {
    const int row = warp * 4 + lane / 8;
    if constexpr (bug == uninitialised_shared) {
      if (m0 + row < p.M) warp_max[row] = largest;
    } else {
      warp_max[row] = largest;
    }
    if constexpr (bug == reduction_race) warp_max[row & ~1] = fmaxf(warp_max[row & ~1], largest);
  }
  __syncthreads();
  if (t < kRows) {
    const float mine = warp_max[bug == tail_shared_off_by_one ? t + (kRows * 4 - kRows + 1) : t];
    if (m0 + t < p.M) p.row_max[split * p.M + m0 + t] = mine;
  }

  // Fragments go to the workspace; halves of a warp swap their values through shared memory on the way, so
  // that each thread stores two neighbouring columns of the row it owns.
  float* partial = p.partial + (int64_t(split) * p.M) * kColumns;
  for (int i = 0; i < 4; ++i) {
    for (int half_tile = 0; half_tile < 2; ++half_tile) {
      staged[warp * 32 + (lane ^ 16)] = d[half_tile][i];
      if constexpr (bug != syncwarp_removed) __syncwarp();
      const float value = staged[warp * 32 + lane];
      if constexpr (bug != syncwarp_removed) __syncwarp();
      const int from = lane ^ 16;
      const int row = from / 4 + i / 2 * 8, column = warp * 16 + half_tile * 8 + from % 4 * 2 + i % 2;
      if (m0 + row < p.M) partial[(m0 + row) * kColumns + column] = value;
    }
  }

  if constexpr (bug != fence_removed) __threadfence();
  __syncthreads();
  if (t == 0) {
    if constexpr (bug == counter_not_atomic) {
      is_last[0] = p.counter[blockIdx.x]++ == unsigned(p.splits) - 1;
    } else {
      is_last[0] = atomicAdd(&p.counter[blockIdx.x], 1) == unsigned(p.splits) - 1;
    }
  }
  __syncthreads();
  if (!is_last[0]) return;
  __threadfence();

  for (int i = t; i < kRows * kColumns / 4; i += kThreads) {
    const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
    if (m0 + row >= p.M) continue;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int s = 0; s < p.splits; ++s) {
      const float* source = p.partial + (int64_t(s) * p.M + m0 + row) * kColumns + column;
      const float4 part =
          *reinterpret_cast<const float4*>(source + (bug == misaligned_vector && column == 0));
      sum.x += part.x;
      sum.y += part.y;
      sum.z += part.z;
      sum.w += part.w;
    }
    *reinterpret_cast<float4*>(p.out + (m0 + row) * kColumns + column) = sum;
  }
  if (t == 0) p.counter[blockIdx.x] = 0;
}

template <int bug>
void run(const Params& p) {
  const LaunchShape shape{dim3(unsigned((p.M + kRows - 1) / kRows), unsigned(p.splits)), dim3(kThreads),
                          kSharedBytes};
  launch("paged_product", paged_product<bug>, shape, nullptr, p);
}

template <int... bugs>
void dispatch(int bug, const Params& p, std::integer_sequence<int, bugs...>) {
  ((bug == bugs ? run<bugs>(p) : void()), ...);
}

}  // namespace tranche::planted

// Returns 0, or 1 if the launch threw; the simulator's last report then says why.
extern "C" __attribute__((visibility("default"))) int tranche_planted(
    int bug, const tranche::planted::Params* params) {
  using namespace tranche::planted;
  try {
    dispatch(bug, *params, std::make_integer_sequence<int, bug_count>());
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
