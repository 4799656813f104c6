// The gradient of a convolution's weight on tensor cores, for 16-bit types: a block computes 32 outputs by 16
// units of (tap, 8 channels) over its chunk of pixels, 32 pixels at a time, of which the next are on their
// way while the present ones are multiplied. Both matrices lie in shared memory as the tensors have them, a
// pixel's channels side by side, and ldmatrix turns them around.
#pragma once

#include "pconv/conv2d_slice_weight_grad.cuh"
#include "pconv/mma_tile.cuh"

namespace tranche {

struct WeightGradMmaTraits {
  static constexpr int kThreads = 128, kWarps = kThreads / 32;
  static constexpr int kOutputs = 32, kOutputUnits = kOutputs / kUnit;
  static constexpr int kColumnUnits = 16;  // of a block
  static constexpr int kPixels = 32;       // of a stage
  static constexpr int kWarpUnits = kColumnUnits / kWarps;
  static constexpr int kStage =
      (kOutputUnits + kColumnUnits) * kPixels;  // units: [unit][pixel] of y, then of x
  static_assert(kWarpUnits % 2 == 0, "ldmatrix brings two units of columns");
};

// Block (x, y, z): units from x * kColumnUnits, outputs from (y % tiles) * kOutputs of group y / tiles, chunk
// z.
template <class T>
__global__ void __launch_bounds__(WeightGradMmaTraits::kThreads) weight_grad_mma_kernel(WeightGradParams p) {
  using Traits = WeightGradMmaTraits;
  constexpr int kPixels = Traits::kPixels, kWarpUnits = Traits::kWarpUnits;
  const Conv2dSliceWeightGradParams& g = p.grad;
  const int group_in = g.c_in / g.groups, group_out = g.c_out / g.groups;
  const int tap_units = (group_in + kUnit - 1) / kUnit, taps = g.kernel[0] * g.kernel[1];
  const int tiles = (group_out + Traits::kOutputs - 1) / Traits::kOutputs;
  const int group = int(blockIdx.y) / tiles, first_output = int(blockIdx.y) % tiles * Traits::kOutputs;
  const int first_unit = int(blockIdx.x) * Traits::kColumnUnits;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t begin = int64_t(blockIdx.z) * p.chunk_pixels, all = pixels_of(g);
  const int64_t end = begin + p.chunk_pixels < all ? begin + p.chunk_pixels : all;
  const T* y = static_cast<const T*>(g.grad_y) + int64_t(group) * group_out * g.y_stride[1];
  const T* x = static_cast<const T*>(g.x) + int64_t(group) * group_in * g.x_stride[1];
  const bool dense_y = p.dense_y && group * group_out % kUnit == 0;
  const bool dense_x = p.dense_x && group * group_in % kUnit == 0;
  uint4* stages = dynamic_smem<uint4>();

  // Thread t brings pixel t % kPixels: 32 lanes write 32 neighbouring units.
  const auto load = [&](int64_t step) {
    uint4* to = stages + step % 2 * Traits::kStage;
    const int64_t pixel = begin + step * kPixels + thread % kPixels;
    const bool inside = pixel < end;
    const OutputPixel at = output_pixel(g, inside ? pixel : begin);
    const int64_t y_at = gradient_offset(g, at);
    for (int u = thread / kPixels; u < Traits::kOutputUnits; u += Traits::kThreads / kPixels) {
      const int o = first_output + u * kUnit;
      uint4* unit = to + u * kPixels + thread % kPixels;
      if (dense_y && o + kUnit <= group_out) {
        ptx::cp_async_16(unit, y + y_at + o, inside);
      } else {
        *unit = gather_unit<T>(
            [&](int e) { return inside && o + e < group_out ? y[y_at + (o + e) * g.y_stride[1]] : T{}; });
      }
    }
    to += Traits::kOutputUnits * kPixels;
    for (int u = thread / kPixels; u < Traits::kColumnUnits; u += Traits::kThreads / kPixels) {
      const int tap = (first_unit + u) / tap_units, channel = (first_unit + u) % tap_units * kUnit;
      const int64_t window = inside && tap < taps ? window_offset(g, at, tap) : -1;
      const bool seen = window >= 0;
      const T* from = x + (seen ? window : 0);
      uint4* unit = to + u * kPixels + thread % kPixels;
      if (dense_x && channel + kUnit <= group_in) {
        ptx::cp_async_16(unit, from + channel, seen);
      } else {
        *unit = gather_unit<T>([&](int e) {
          return seen && channel + e < group_in ? from[(channel + e) * g.x_stride[1]] : T{};
        });
      }
    }
    ptx::cp_async_commit();
  };

  float sum[2][kWarpUnits][4] = {};
  const int64_t steps = (end - begin + kPixels - 1) / kPixels;
  load(0);
  for (int64_t step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load(step + 1);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    const uint4* gradients = stages + step % 2 * Traits::kStage;
    const uint4* windows = gradients + (Traits::kOutputUnits + warp * kWarpUnits) * kPixels;
#pragma unroll
    for (int k = 0; k < kPixels; k += 16) {
      // matrices of 8 pixels by 8 channels; of the left operand: both halves of the outputs, then of the
      // pixels
      uint32_t left[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ptx::ldmatrix_x4_trans(left[m],
                               gradients + (m * 2 + lane / 8 % 2) * kPixels + k + lane / 16 * 8 + lane % 8);
      }
#pragma unroll
      for (int n = 0; n < kWarpUnits; n += 2) {
        uint32_t right[4];
        ptx::ldmatrix_x4_trans(right, windows + (n + lane / 16) * kPixels + k + lane / 8 % 2 * 8 + lane % 8);
        const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          ptx::mma_m16n8k16<T>(sum[m][n], left[m], first);
          ptx::mma_m16n8k16<T>(sum[m][n + 1], left[m], second);
        }
      }
    }
    __syncthreads();  // before the step after the next overwrites what others read here
  }

  const int columns = group_in * taps;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < kWarpUnits; ++n) {
      const int unit = first_unit + warp * kWarpUnits + n, tap = unit / tap_units;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = first_output + m * 16 + lane / 4 + i / 2 * 8;
        const int channel = unit % tap_units * kUnit + lane % 4 * 2 + i % 2;
        if (output >= group_out || tap >= taps || channel >= group_in) continue;
        const int64_t row = int64_t(blockIdx.z) * g.c_out + int64_t(group) * group_out + output;
        p.partials[row * columns + tap * group_in + channel] = sum[m][n][i];
      }
    }
  }
}

}  // namespace tranche
