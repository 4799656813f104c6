// What the tensor-core kernels of the family share: operands in shared memory as 16-byte units of 8 channels,
// [k / 8][row][8], so that ldmatrix meets no bank twice whatever the rows' first address is, and a warp's
// products over them.
#pragma once

#include "core/launch.cuh"
#include "core/ptx.cuh"

namespace tranche {

constexpr int kUnit = 8;  // elements of 16 bytes

__device__ __forceinline__ bool aligned_16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Eight elements of T, of which element(i) gives the i-th.
template <class T, class F>
__device__ __forceinline__ uint4 gather_unit(const F& element) {
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pair[i] = uint32_t(element(2 * i).bits) | uint32_t(element(2 * i + 1).bits) << 16;
  }
  return {pair[0], pair[1], pair[2], pair[3]};
}

// The sums of one warp: kRowTiles times 16 rows by kColumnTiles times 8 columns. Lane l holds, of tile (m,
// n), rows l / 4 and l / 4 + 8 of columns 2 (l % 4) and the next.
template <class T, int kRowTiles, int kColumnTiles>
struct MmaTile {
  static_assert(kColumnTiles % 2 == 0, "ldmatrix brings two tiles of columns");
  float d[kRowTiles][kColumnTiles][4];

  __device__ __forceinline__ static int lane() { return int(threadIdx.x) % 32; }

  // start(column) for every row.
  template <class F>
  __device__ __forceinline__ void set(const F& start) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = start(n * 8 + lane() % 4 * 2 + i % 2);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) d[m][n][i] = value;
      }
    }
  }

  // += 16 products. a[m]: this lane's row (lane % 16 of tile m) in the first half of k; the second half lies
  // a_half units on. b: [2][columns][8]. Tiles of columns from `live` on are left alone.
  __device__ __forceinline__ void step(const uint4* const (&a)[kRowTiles], int a_half, const uint4* b,
                                       int columns, int live) {
    uint32_t left[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) ptx::ldmatrix_x4(left[m], a[m] + lane() / 16 * a_half);
    step(left, b, columns, live);
  }

  // The same from fragments: left[m] of tile m, as mma wants it.
  __device__ __forceinline__ void step(const uint32_t (&left)[kRowTiles][4], const uint4* b, int columns,
                                       int live) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      if (n >= live) break;
      uint32_t right[4];
      ptx::ldmatrix_x4(right, b + lane() / 8 % 2 * columns + (n + lane() / 16) * 8 + lane() % 8);
      const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::mma_m16n8k16<T>(d[m][n], left[m], first);
        ptx::mma_m16n8k16<T>(d[m][n + 1], left[m], second);
      }
    }
  }

  // f(row of the warp, column, sum) for each sum of this lane.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          f(m * 16 + lane() / 4 + i / 2 * 8, n * 8 + lane() % 4 * 2 + i % 2, d[m][n][i]);
        }
      }
    }
  }
};

}  // namespace tranche
