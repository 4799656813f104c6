// One row of one tile a thread, strided over the grid.
#pragma once

#include "bits/bits_unpack.h"
#include "core/launch.cuh"

namespace tranche {

__global__ void __launch_bounds__(256) bits_unpack_kernel(BitsUnpackParams p) {
  const int64_t rows = p.w.row_tiles * p.w.input_tiles * kTileRows, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows; i += step) {
    unpack_tile_row(p, i / kTileRows, int(i % kTileRows));
  }
}

}  // namespace tranche
