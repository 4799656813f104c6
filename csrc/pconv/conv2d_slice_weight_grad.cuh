// The gradient of a convolution's weight as one matrix product per group: outputs x pixels times pixels x
// (tap, channel), the pixels cut into chunks at fixed places. A chunk's partial gradients are float, one
// chain over its pixels each; a last launch adds them up in the order of the chunks.
#pragma once

#include "core/launch.cuh"
#include "core/ptx.cuh"
#include "pconv/conv2d_slice_weight_grad.h"

namespace tranche {

struct WeightGradTraits {
  static constexpr int kThreads = 256;
  static constexpr int kOutputs = 32;  // of a block
  static constexpr int kColumns = 64;  // (tap, channel) of a block
  static constexpr int kDepth = 16;    // pixels between two barriers
  static constexpr int kOwn = 8;       // outputs of a thread, all of one column
  static_assert(kOutputs * kColumns == kThreads * kOwn);
  static constexpr int kChannels = 32, kLanes = 8;  // of a block of the kernel for a channel each
  static_assert(kChannels * kLanes == kThreads);
};

struct WeightGradParams {
  Conv2dSliceWeightGradParams grad;
  float* partials;  // [chunks][c_out][taps][c_in / groups]
  int64_t chunk_pixels, chunks;
  bool dense_x, dense_y;  // units of channels, from a multiple of eight on, are 16 aligned bytes
};

__device__ __forceinline__ int64_t pixels_of(const Conv2dSliceWeightGradParams& p) {
  return int64_t(p.batch) * p.out_height * p.out_width;
}

// A pixel of grad_y.
struct OutputPixel {
  int64_t b;
  int y, x;
};

__device__ __forceinline__ OutputPixel output_pixel(const Conv2dSliceWeightGradParams& p, int64_t pixel) {
  const int64_t row = pixel / p.out_width, b = row / p.out_height;
  return {b, int(row - b * p.out_height), int(pixel - row * p.out_width)};
}

// Where channel 0 of a pixel of grad_y lies.
__device__ __forceinline__ int64_t gradient_offset(const Conv2dSliceWeightGradParams& p,
                                                   const OutputPixel& at) {
  return at.b * p.y_stride[0] + at.y * p.y_stride[2] + at.x * p.y_stride[3];
}

// Where channel `start` of what a tap of an output pixel sees lies; negative outside the image.
__device__ __forceinline__ int64_t window_offset(const Conv2dSliceWeightGradParams& p, const OutputPixel& at,
                                                 int tap) {
  const int down = tap / p.kernel[1], right = tap - down * p.kernel[1];
  const int64_t y = int64_t(at.y) * p.stride[0] - p.padding[0] + int64_t(down) * p.dilation[0];
  const int64_t x = int64_t(at.x) * p.stride[1] - p.padding[1] + int64_t(right) * p.dilation[1];
  if (y < 0 || y >= p.height || x < 0 || x >= p.width) return -1;
  return at.b * p.x_stride[0] + p.start * p.x_stride[1] + y * p.x_stride[2] + x * p.x_stride[3];
}

template <class T>
__device__ __forceinline__ float window_value(const Conv2dSliceWeightGradParams& p, const OutputPixel& pixel,
                                              int tap, int64_t channel) {
  const int64_t at = window_offset(p, pixel, tap);
  return at < 0 ? 0.0f : to_float(static_cast<const T*>(p.x)[at + channel * p.x_stride[1]]);
}

// Block (x, y, z): columns from x * kColumns, outputs from (y % tiles) * kOutputs of group y / tiles, chunk
// z.
template <class T>
__global__ void __launch_bounds__(WeightGradTraits::kThreads) weight_grad_kernel(WeightGradParams p) {
  using Traits = WeightGradTraits;
  constexpr int kOutputs = Traits::kOutputs, kColumns = Traits::kColumns, kDepth = Traits::kDepth;
  constexpr int kOwn = Traits::kOwn, kThreads = Traits::kThreads;
  // one more, so that lanes of one pixel and of one column both miss each other's banks
  constexpr int kOutputRow = kOutputs + 1, kColumnRow = kColumns + 1;
  SHARED(float, gradients, kDepth* kOutputRow);
  SHARED(float, windows, kDepth* kColumnRow);

  const Conv2dSliceWeightGradParams& g = p.grad;
  const int group_in = g.c_in / g.groups, group_out = g.c_out / g.groups;
  const int columns = group_in * g.kernel[0] * g.kernel[1];
  const int tiles = (group_out + kOutputs - 1) / kOutputs;
  const int group = int(blockIdx.y) / tiles, first_output = int(blockIdx.y) % tiles * kOutputs;
  const int first_column = int(blockIdx.x) * kColumns, thread = int(threadIdx.x);
  const int64_t begin = int64_t(blockIdx.z) * p.chunk_pixels, all = pixels_of(g);
  const int64_t end = begin + p.chunk_pixels < all ? begin + p.chunk_pixels : all;
  // Neighbouring lanes read neighbouring addresses: channels where they are dense, pixels elsewhere.
  const bool y_last = g.y_stride[1] == 1 && g.y_stride[3] != 1;
  const bool x_last = g.x_stride[1] == 1 && g.x_stride[3] != 1;

  const int own_column = thread % kColumns, own_first = thread / kColumns * kOwn;
  float sum[kOwn] = {};
  for (int64_t first = begin; first < end; first += kDepth) {
    for (int i = thread; i < kDepth * kOutputs; i += kThreads) {
      const int d = y_last ? i / kOutputs : i % kDepth, o = y_last ? i % kOutputs : i / kDepth;
      float value = 0.0f;
      if (first + d < end && first_output + o < group_out) {
        const int64_t output = int64_t(group) * group_out + first_output + o;
        value = to_float(static_cast<const T*>(
            g.grad_y)[gradient_offset(g, output_pixel(g, first + d)) + output * g.y_stride[1]]);
      }
      gradients[d * kOutputRow + o] = value;
    }
    for (int i = thread; i < kDepth * kColumns; i += kThreads) {
      const int d = x_last ? i / kColumns : i % kDepth, n = x_last ? i % kColumns : i / kDepth;
      const int column = first_column + n;
      float value = 0.0f;
      if (first + d < end && column < columns) {
        const int64_t channel = int64_t(group) * group_in + column % group_in;
        value = window_value<T>(g, output_pixel(g, first + d), column / group_in, channel);
      }
      windows[d * kColumnRow + n] = value;
    }
    __syncthreads();
    const int live = end - first < kDepth ? int(end - first) : kDepth;
    for (int d = 0; d < live; ++d) {
      const float x = windows[d * kColumnRow + own_column];
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        sum[o] = fmaf(gradients[d * kOutputRow + own_first + o], x, sum[o]);
      }
    }
    __syncthreads();  // before the next round overwrites what others read here
  }

  if (first_column + own_column >= columns) return;
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int output = first_output + own_first + o;
    if (output >= group_out) break;
    const int64_t row = int64_t(blockIdx.z) * g.c_out + int64_t(group) * group_out + output;
    p.partials[row * columns + first_column + own_column] = sum[o];
  }
}

// A channel each. Block (x, y, z): channels from x * kChannels, tap y, chunk z; every channel has kLanes
// threads, whose sums are added in order.
template <class T>
__global__ void __launch_bounds__(WeightGradTraits::kThreads)
    weight_grad_depthwise_kernel(WeightGradParams p) {
  using Traits = WeightGradTraits;
  SHARED(float, sums, Traits::kLanes* Traits::kChannels);
  const Conv2dSliceWeightGradParams& g = p.grad;
  const bool channels_last = g.x_stride[1] == 1 && g.x_stride[3] != 1;
  const int thread = int(threadIdx.x), tap = int(blockIdx.y);
  const int own = channels_last ? thread % Traits::kChannels : thread / Traits::kLanes;
  const int lane = channels_last ? thread / Traits::kChannels : thread % Traits::kLanes;
  const int64_t channel = int64_t(blockIdx.x) * Traits::kChannels + own;
  const int64_t begin = int64_t(blockIdx.z) * p.chunk_pixels, all = pixels_of(g);
  const int64_t end = begin + p.chunk_pixels < all ? begin + p.chunk_pixels : all;
  float sum = 0.0f;
  if (channel < g.c_out) {
    for (int64_t i = begin + lane; i < end; i += Traits::kLanes) {
      const OutputPixel at = output_pixel(g, i);
      const float y =
          to_float(static_cast<const T*>(g.grad_y)[gradient_offset(g, at) + channel * g.y_stride[1]]);
      sum = fmaf(y, window_value<T>(g, at, tap, channel), sum);
    }
  }
  sums[lane * Traits::kChannels + own] = sum;
  __syncthreads();
  if (lane != 0 || channel >= g.c_out) return;
  for (int other = 1; other < Traits::kLanes; ++other) sum += sums[other * Traits::kChannels + own];
  p.partials[(int64_t(blockIdx.z) * g.c_out + channel) * gridDim.y + tap] = sum;
}

// One element of the gradient per thread.
template <class T>
__global__ void __launch_bounds__(WeightGradTraits::kThreads) weight_grad_merge_kernel(WeightGradParams p) {
  const Conv2dSliceWeightGradParams& g = p.grad;
  const int group_in = g.c_in / g.groups, taps = g.kernel[0] * g.kernel[1];
  const int64_t columns = int64_t(group_in) * taps, size = columns * g.c_out;
  const int64_t i = int64_t(blockIdx.x) * WeightGradTraits::kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = p.partials[i];
  for (int64_t c = 1; c < p.chunks; ++c) sum += p.partials[c * size + i];
  const int64_t output = i / columns;
  const int tap = int(i % columns) / group_in, channel = int(i % group_in);
  static_cast<T*>(g.grad_weight)[(output * group_in + channel) * taps + tap] = from_float<T>(sum);
}

}  // namespace tranche
