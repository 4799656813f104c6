// Convolution of a slice of channels on tensor cores, for 16-bit types and one group. A block computes 8 x 16
// output pixels by 32 outputs. Per chunk of 16 channels it brings the pixels with their halo into shared
// memory once, zeros where the image or the slice ends; a tap is then an offset into that. Sums are one chain
// over (chunk, tap, the instruction's 16 products), whatever the image's size.
#pragma once

#include "pconv/mma_tile.cuh"
#include "pconv/partial_conv2d.cuh"

namespace tranche {

struct PartialConv2dMmaTraits {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 8, kColumns = 16;  // output pixels of a block
  static constexpr int kOutputs = 32;             // of a block
  static constexpr int kChunk = 16;               // channels
  static constexpr int kWarpRows = 2;             // a row tile each
  static_assert(kRows == kThreads / 32 * kWarpRows);
  static constexpr size_t kMostShared = 96 << 10;  // every supported GPU gives a block that much
};

struct PartialConv2dMmaParams {
  PartialConv2dParams conv;
  void* packed;  // [outputs / 32][chunks][taps][2][32][8]
  int32_t chunks, tiles_x, tiles_y;
  int32_t halo_rows, halo_columns;
  bool dense;  // units of x are 16 aligned bytes
};

// One element of the packed weights per thread.
template <class T>
__global__ void __launch_bounds__(PartialConv2dTraits::kThreads)
    partial_conv2d_pack_kernel(PartialConv2dMmaParams p) {
  using Traits = PartialConv2dMmaTraits;
  const PartialConv2dParams& conv = p.conv;
  const int taps = conv.kernel[0] * conv.kernel[1];
  const int tiles = (conv.c_out + Traits::kOutputs - 1) / Traits::kOutputs;
  const int64_t i = int64_t(blockIdx.x) * PartialConv2dTraits::kThreads + threadIdx.x;
  if (i >= int64_t(tiles) * p.chunks * taps * Traits::kChunk * Traits::kOutputs) return;
  const int64_t unit = i / kUnit;
  const int n = int(unit % Traits::kOutputs), half = int(unit / Traits::kOutputs % 2);
  const int64_t block = unit / (2 * Traits::kOutputs);  // (tile, chunk, tap)
  const int tap = int(block % taps), chunk = int(block / taps % p.chunks);
  const int output = int(block / taps / p.chunks) * Traits::kOutputs + n;
  const int channel = chunk * Traits::kChunk + half * kUnit + int(i % kUnit);
  T value{};
  if (output < conv.c_out && channel < conv.c_in) {
    value = static_cast<const T*>(conv.weight)[(int64_t(output) * conv.c_in + channel) * taps + tap];
  }
  static_cast<T*>(p.packed)[i] = value;
}

// Channels [16 chunk, 16 chunk + 16) of the slice, at x, of the pixels from (top, left) on: halo is [2][rows]
// [columns]. Commits nothing.
template <class T, int kThreads>
__device__ __forceinline__ void load_halo(const PartialConv2dParams& conv, const T* x, int chunk, int64_t top,
                                          int64_t left, int rows, int columns, bool dense, uint4* halo) {
  // Neighbouring threads read neighbouring addresses: the halves of a pixel, or pixels.
  const bool channels_last = conv.x_stride[1] == 1;
  const int area = rows * columns;
  for (int i = int(threadIdx.x); i < 2 * area; i += kThreads) {
    const int half = channels_last ? i % 2 : i / area, cell = channels_last ? i / 2 : i % area;
    const int64_t row = top + cell / columns, column = left + cell % columns;
    const bool inside = row >= 0 && row < conv.height && column >= 0 && column < conv.width;
    const int channel = chunk * PartialConv2dMmaTraits::kChunk + half * kUnit;
    const T* from = x + (inside ? row * conv.x_stride[2] + column * conv.x_stride[3] : 0);
    uint4* to = halo + half * area + cell;
    if (dense && channel + kUnit <= conv.c_in) {
      ptx::cp_async_16(to, from + channel, inside);
    } else {
      *to = gather_unit<T>([&](int e) {
        return inside && channel + e < conv.c_in ? from[(channel + e) * conv.x_stride[1]] : T{};
      });
    }
  }
}

// Block (x, y): tile x of all images, outputs from y * kOutputs.
template <class T>
__global__ void __launch_bounds__(PartialConv2dMmaTraits::kThreads)
    partial_conv2d_mma_kernel(PartialConv2dMmaParams p) {
  using Traits = PartialConv2dMmaTraits;
  constexpr int kThreads = Traits::kThreads, kOutputs = Traits::kOutputs;
  const PartialConv2dParams& conv = p.conv;
  const int taps = conv.kernel[0] * conv.kernel[1], area = p.halo_rows * p.halo_columns;
  uint4* halo = dynamic_smem<uint4>();  // [2][halo_rows][halo_columns]
  uint4* weights = halo + 2 * area;     // [taps][2][kOutputs]

  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t tile = int64_t(blockIdx.x), image = int64_t(p.tiles_x) * p.tiles_y;
  const int64_t b = tile / image;
  const int64_t first_y = tile % image / p.tiles_x * Traits::kRows;
  const int64_t first_x = tile % p.tiles_x * Traits::kColumns;
  const int first_output = int(blockIdx.y) * kOutputs;
  const int live = (conv.c_out - first_output + 7) / 8;  // tiles of outputs

  MmaTile<T, Traits::kWarpRows, kOutputs / 8> sums;
  sums.set([&](int column) {
    const bool has = conv.bias != nullptr && first_output + column < conv.c_out;
    return has ? to_float(static_cast<const T*>(conv.bias)[first_output + column]) : 0.0f;
  });

  const T* x = static_cast<const T*>(conv.x) + b * conv.x_stride[0] + conv.start * conv.x_stride[1];
  const int64_t top = first_y * conv.stride[0] - conv.padding[0];
  const int64_t left = first_x * conv.stride[1] - conv.padding[1];
  const uint4* packed =
      static_cast<const uint4*>(p.packed) + int64_t(blockIdx.y) * p.chunks * taps * 2 * kOutputs;
  for (int chunk = 0; chunk < p.chunks; ++chunk, packed += taps * 2 * kOutputs) {
    load_halo<T, kThreads>(conv, x, chunk, top, left, p.halo_rows, p.halo_columns, p.dense, halo);
    for (int i = thread; i < taps * 2 * kOutputs; i += kThreads) {
      ptx::cp_async_16(weights + i, packed + i, true);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    for (int tap = 0; tap < taps; ++tap) {
      const int down = tap / conv.kernel[1] * conv.dilation[0],
                right = tap % conv.kernel[1] * conv.dilation[1];
      const uint4* rows[Traits::kWarpRows];
#pragma unroll
      for (int m = 0; m < Traits::kWarpRows; ++m) {
        const int row = (warp * Traits::kWarpRows + m) * conv.stride[0] + down;
        rows[m] = halo + row * p.halo_columns + lane % 16 * conv.stride[1] + right;
      }
      sums.step(rows, area, weights + tap * 2 * kOutputs, kOutputs, live);
    }
    __syncthreads();  // before the next chunk overwrites what others read here
  }

  sums.each([&](int row, int column, float value) {
    const PixelPosition at{b, first_y + warp * Traits::kWarpRows + row / 16, first_x + row % 16};
    const int output = first_output + column;
    if (at.y < conv.out_height && at.x < conv.out_width && output < conv.c_out) {
      store_output<T>(conv, at, output, value);
    }
  });
}

}  // namespace tranche
