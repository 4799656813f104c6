// Packed weights in a lane's registers.
//
// A warp takes a chunk of four tiles of inputs, 128 inputs: lane 4g + t takes rows 2g and 2g + 1 of tile t.
// Step s of a chunk feeds one MMA of depth 32 whose order of inputs is the lane's own: its slots t and t + 4
// are the words (q, s) = (0, s) and (1, s) of tile t. Both operands follow it, so sums are of the right
// pairs, and a lane's words of x are 32 consecutive bytes.
#pragma once

#include "bits/packed.h"
#include "core/launch.cuh"

namespace tranche {

constexpr int kChunkTiles = 4;

// What kernels are compiled for beside 3, 5, 7 or 8 guarded planes. Single planes have one kernel, told at
// run time how many to read.
constexpr int kPlainCodes = 0, kSinglePlanes = -1;

// Rows 2g and 2g + 1 of one tile.
struct LaneTile {
  TileRow rows[2];
  uint2 plain[2][4];  // by q, s: the plain layout's words of both rows
};

__device__ __forceinline__ uint2 load_words(const uint8_t* from) {
  return *reinterpret_cast<const uint2*>(from);
}

__device__ __forceinline__ void load_plain_codes(const PackedWeight& w, int64_t tile, int g, LaneTile& lane) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      lane.plain[q][s] = load_words(w.data + tile * kTileBytes8 + 256 * q + 64 * s + 8 * g);
    }
  }
}

template <int planes>
__device__ __forceinline__ void load_guarded_planes(const PackedWeight& w, int64_t tile, int g,
                                                    LaneTile& lane) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int at = 64 * q + 8 * g;
    uint2 words = load_words(slice_stream(w, 0, tile) + at);
    lane.rows[0].two[0][q] = words.x;
    lane.rows[1].two[0][q] = words.y;
    if constexpr (planes >= 5) {
      words = load_words(slice_stream(w, 2, tile) + at);
      lane.rows[0].two[1][q] = words.x;
      lane.rows[1].two[1][q] = words.y;
    }
    if constexpr (planes >= 7) {
      words = load_words(slice_stream(w, 3, tile) + at);
      lane.rows[0].two[2][q] = words.x;
      lane.rows[1].two[2][q] = words.y;
    }
  }
  uint2 words = load_words(slice_stream(w, 1, tile) + 8 * g);
  lane.rows[0].one[0] = words.x;
  lane.rows[1].one[0] = words.y;
  if constexpr (planes == 8) {
    words = load_words(slice_stream(w, 4, tile) + 8 * g);
    lane.rows[0].one[1] = words.x;
    lane.rows[1].one[1] = words.y;
  }
}

__device__ __forceinline__ void load_single_planes(const PackedWeight& w, int64_t tile, int g,
                                                   LaneTile& lane) {
  uint32_t first[8] = {}, second[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < w.planes) {
      const uint2 words = load_words(plane_stream(w, i, tile) + 8 * g);
      first[i] = words.x;
      second[i] = words.y;
    }
  }
  lane.rows[0] = join_row(first);
  lane.rows[1] = join_row(second);
}

// Loads tile `tile`, or zeros (a byte that adds nothing to a sum) when it is not `valid`.
template <int planes>
__device__ __forceinline__ LaneTile load_lane_tile(const PackedWeight& w, int64_t tile, int g, bool valid) {
  LaneTile lane = {};
  if (!valid) return lane;
  if constexpr (planes == kPlainCodes) {
    load_plain_codes(w, tile, g, lane);
  } else if constexpr (planes == kSinglePlanes) {
    load_single_planes(w, tile, g, lane);
  } else {
    load_guarded_planes<planes>(w, tile, g, lane);
  }
  return lane;
}

// Four rounded bytes, W_l * 2^(8-l) + 128 each: inputs 16q + 4s .. +3 of row 2g + row.
template <int planes>
__device__ __forceinline__ uint32_t lane_word(const LaneTile& lane, int row, int q, int s,
                                              Rounding rounding) {
  if constexpr (planes == kPlainCodes) return row == 0 ? lane.plain[q][s].x : lane.plain[q][s].y;
  return round_word(unpack_word(lane.rows[row], q, s), rounding);
}

}  // namespace tranche
