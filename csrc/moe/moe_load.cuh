// Eight consecutive elements of a row, as a lane holds them: pairs for tensor cores, or floats.
#pragma once

#include <type_traits>

#include "bits/packed.h"
#include "core/ptx.cuh"

namespace tranche {

template <class T>
struct Eight {
  uint32_t pair[4];
};
template <>
struct Eight<float> {
  float value[8];
};

template <class T>
__device__ __forceinline__ Eight<T> no_eight() {
  Eight<T> none;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 8; ++i) none.value[i] = 0.0f;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) none.pair[i] = 0;
  }
  return none;
}

// Whether vector loads may be used: k is a multiple of 8, so this is a property of the row.
template <class W>
__device__ __forceinline__ bool vector_aligned(const W* row) {
  return reinterpret_cast<uintptr_t>(row) % (sizeof(W) == 1 ? 8 : 16) == 0;
}

__device__ __forceinline__ float element(const float* row, int k) { return row[k]; }
__device__ __forceinline__ float element(const int8_t* row, int k) { return float(row[k]); }
template <class W>
__device__ __forceinline__ float element(const W* row, int k) {
  return to_float(row[k]);
}

// Elements k..k+7 of a row, those from `depth` on 0; a null row is all 0. int8 becomes T exactly.
template <class T, class W>
__device__ __forceinline__ Eight<T> load_eight(const W* row, int k, int depth) {
  Eight<T> e = no_eight<T>();
  if (row == nullptr || k >= depth) return e;
  const bool whole = k + 8 <= depth && vector_aligned(row);
  if constexpr (std::is_same_v<T, float>) {
    if constexpr (std::is_same_v<W, float>) {
      if (whole) {
        const uint4 low = ptx::load_streaming_16(row + k), high = ptx::load_streaming_16(row + k + 4);
        e.value[0] = __uint_as_float(low.x), e.value[1] = __uint_as_float(low.y);
        e.value[2] = __uint_as_float(low.z), e.value[3] = __uint_as_float(low.w);
        e.value[4] = __uint_as_float(high.x), e.value[5] = __uint_as_float(high.y);
        e.value[6] = __uint_as_float(high.z), e.value[7] = __uint_as_float(high.w);
        return e;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) e.value[i] = k + i < depth ? element(row, k + i) : 0.0f;
  } else if constexpr (std::is_same_v<W, T>) {
    if (whole) {
      const uint4 all = ptx::load_streaming_16(row + k);
      e.pair[0] = all.x, e.pair[1] = all.y, e.pair[2] = all.z, e.pair[3] = all.w;
      return e;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = k + 2 * i < depth ? row[k + 2 * i].bits : 0u;
      const uint32_t high = k + 2 * i + 1 < depth ? row[k + 2 * i + 1].bits : 0u;
      e.pair[i] = high << 16 | low;
    }
  } else {
    static_assert(std::is_same_v<W, int8_t>);
    uint32_t bytes[2] = {0, 0};
    if (whole) {
      const uint2 all = *reinterpret_cast<const uint2*>(row + k);
      bytes[0] = all.x, bytes[1] = all.y;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t byte = k + i < depth ? uint32_t(uint8_t(row[k + i])) : 0u;
        bytes[i / 4] |= byte << (8 * (i % 4));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = bytes[i / 2] >> (16 * (i % 2));
      e.pair[i] = ptx::pack<T>(float(int8_t(word & 0xffu)), float(int8_t(word >> 8 & 0xffu)));
    }
  }
  return e;
}

// One row of a packed weight; -1: none.
struct PackedRow {
  const PackedWeight* w;
  int row;
};

// Likewise, but that elements from `depth` on may be any code: what they meet is 0.
template <class T>
__device__ __forceinline__ Eight<T> load_eight(PackedRow from, int k, int depth) {
  Eight<T> e = no_eight<T>();
  if (from.row < 0 || k >= depth) return e;
  const PackedWeight& w = *from.w;
  // offsets of 32 bits from where a stream starts: fewer registers than addresses take
  const uint32_t tile = uint32_t(from.row / kTileRows) * uint32_t(w.input_tiles) + uint32_t(k / kTileInputs);
  const int row = from.row % kTileRows, q = k % kTileInputs / 16, s = k % 16 / 4;
  const auto word = [&](int slice, int at) {
    const uint32_t offset = (slice == 1 || slice == 4 ? 64u : 128u) * tile + 4u * uint32_t(at);
    return bits_above(slice) < w.planes
               ? *reinterpret_cast<const uint32_t*>(slice_stream(w, slice, 0) + offset)
               : 0u;
  };
  TileRow packed = {};  // what it holds of q alone, as if that were 0
  packed.two[0][0] = word(0, 16 * q + row);
  packed.two[1][0] = word(2, 16 * q + row);
  packed.two[2][0] = word(3, 16 * q + row);
  packed.one[0] = word(1, row) >> q;
  packed.one[1] = word(4, row) >> q;
  const Rounding rounding = rounding_of_bits(w.bits);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t bytes = round_word(unpack_word(packed, 0, s + half), rounding);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float low = float(int32_t(bytes >> (8 * i) & 0xffu) - 128);
      const float high = float(int32_t(bytes >> (8 * i + 8) & 0xffu) - 128);
      if constexpr (std::is_same_v<T, float>) {
        e.value[4 * half + i] = low, e.value[4 * half + i + 1] = high;
      } else {
        e.pair[2 * half + i / 2] = ptx::pack<T>(low, high);
      }
    }
  }
  return e;
}

// The i-th of them as float.
template <class T>
__device__ __forceinline__ float value_of(const Eight<T>& e, int i) {
  if constexpr (std::is_same_v<T, float>) {
    return e.value[i];
  } else {
    return to_float(T{uint16_t(e.pair[i / 2] >> (16 * (i % 2)))});
  }
}

}  // namespace tranche
