// Convolution of a slice of channels as one matrix product per group: pixels x (taps, channels) times
// outputs, the left matrix read from x as it lies, in any layout. Sums are float, in one chain per output
// with k ascending.
#pragma once

#include "core/launch.cuh"
#include "core/ptx.cuh"
#include "pconv/partial_conv2d.h"

namespace tranche {

struct PartialConv2dTraits {
  static constexpr int kThreads = 256;
  static constexpr int kPixels = 128;  // of a block
  static constexpr int kOutputs = 16;  // of a block
  static constexpr int kDepth = 16;    // products between two barriers
  static constexpr int kOwn = 8;       // outputs of a thread, all of one pixel
  static_assert(kPixels * kOutputs == kThreads * kOwn);
  static_assert(kPixels * kDepth % kThreads == 0 && kDepth * kOutputs <= kThreads);
};

struct PixelPosition {
  int64_t b, y, x;
};

__device__ __forceinline__ PixelPosition pixel_position(const PartialConv2dParams& p, int64_t pixel) {
  const int64_t row = pixel / p.out_width;
  return {row / p.out_height, row % p.out_height, pixel % p.out_width};
}

// The element of x behind product k = (tap, channel in the group) of one output pixel; zero outside the
// image.
template <class T>
__device__ __forceinline__ float input_of(const PartialConv2dParams& p, const PixelPosition& at, int group,
                                          int tap, int channel) {
  const int64_t y = at.y * p.stride[0] - p.padding[0] + int64_t(tap / p.kernel[1]) * p.dilation[0];
  const int64_t x = at.x * p.stride[1] - p.padding[1] + int64_t(tap % p.kernel[1]) * p.dilation[1];
  if (y < 0 || y >= p.height || x < 0 || x >= p.width) return 0.0f;
  const int64_t c = int64_t(p.start) + int64_t(group) * (p.c_in / p.groups) + channel;
  return to_float(static_cast<const T*>(
      p.x)[at.b * p.x_stride[0] + c * p.x_stride[1] + y * p.x_stride[2] + x * p.x_stride[3]]);
}

template <class T>
__device__ __forceinline__ void store_output(const PartialConv2dParams& p, const PixelPosition& at,
                                             int64_t channel, float value) {
  static_cast<T*>(p.y)[at.b * p.y_stride[0] + (p.y_start + channel) * p.y_stride[1] + at.y * p.y_stride[2] +
                       at.x * p.y_stride[3]] = from_float<T>(value);
}

// Block (x, y): pixels from x * kPixels, outputs from (y % tiles) * kOutputs of group y / tiles.
template <class T>
__global__ void __launch_bounds__(PartialConv2dTraits::kThreads)
    partial_conv2d_kernel(PartialConv2dParams p) {
  using Traits = PartialConv2dTraits;
  constexpr int kPixels = Traits::kPixels, kOutputs = Traits::kOutputs, kDepth = Traits::kDepth;
  constexpr int kOwn = Traits::kOwn, kThreads = Traits::kThreads;
  constexpr int kRow =
      kPixels + 1;  // so that lanes of one pixel and of one product both miss each other's banks
  SHARED(float, inputs, kDepth* kRow);
  SHARED(float, weights, kDepth* kOutputs);

  const int group_in = p.c_in / p.groups, group_out = p.c_out / p.groups;
  const int tiles = (group_out + kOutputs - 1) / kOutputs;
  const int group = int(blockIdx.y) / tiles, first_output = int(blockIdx.y) % tiles * kOutputs;
  const int cells = p.kernel[0] * p.kernel[1], depth = group_in * cells;
  const int64_t pixels = int64_t(p.batch) * p.out_height * p.out_width;
  const int64_t first_pixel = int64_t(blockIdx.x) * kPixels;
  const int thread = int(threadIdx.x);
  // Neighbouring lanes read neighbouring addresses: channels where they are dense, pixels elsewhere.
  const bool channels_last = p.x_stride[1] == 1 && p.x_stride[3] != 1;

  const int own_pixel = thread % kPixels, own_first = thread / kPixels * kOwn;
  float sum[kOwn];
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int output = first_output + own_first + o;
    const bool starts = p.bias != nullptr && output < group_out;
    sum[o] = starts ? to_float(static_cast<const T*>(p.bias)[int64_t(group) * group_out + output]) : 0.0f;
  }

  for (int first = 0; first < depth; first += kDepth) {
    for (int i = thread; i < kPixels * kDepth; i += kThreads) {
      const int k = channels_last ? i % kDepth : i / kPixels;
      const int pixel = channels_last ? i / kDepth : i % kPixels;
      float value = 0.0f;
      if (first + k < depth && first_pixel + pixel < pixels) {
        const PixelPosition at = pixel_position(p, first_pixel + pixel);
        value = input_of<T>(p, at, group, (first + k) / group_in, (first + k) % group_in);
      }
      inputs[k * kRow + pixel] = value;
    }
    if (thread < kDepth * kOutputs) {
      const int k = thread / kOutputs, output = first_output + thread % kOutputs;
      float value = 0.0f;
      if (first + k < depth && output < group_out) {
        const int64_t row = int64_t(group) * group_out + output;
        const int64_t cell = (row * group_in + (first + k) % group_in) * cells + (first + k) / group_in;
        value = to_float(static_cast<const T*>(p.weight)[cell]);
      }
      weights[thread] = value;
    }
    __syncthreads();
    const int live = depth - first < kDepth ? depth - first : kDepth;
    for (int k = 0; k < live; ++k) {
      const float x = inputs[k * kRow + own_pixel];
#pragma unroll
      for (int o = 0; o < kOwn; ++o) sum[o] = fmaf(x, weights[k * kOutputs + own_first + o], sum[o]);
    }
    __syncthreads();  // before the next round overwrites what others read here
  }

  if (first_pixel + own_pixel >= pixels) return;
  const PixelPosition at = pixel_position(p, first_pixel + own_pixel);
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int output = first_output + own_first + o;
    if (output < group_out) store_output<T>(p, at, int64_t(group) * group_out + output, sum[o]);
  }
}

// A channel each: one output per thread.
template <class T>
__global__ void __launch_bounds__(PartialConv2dTraits::kThreads)
    partial_conv2d_depthwise_kernel(PartialConv2dParams p) {
  const int64_t outputs = int64_t(p.batch) * p.out_height * p.out_width * p.c_out;
  const int64_t i = int64_t(blockIdx.x) * PartialConv2dTraits::kThreads + threadIdx.x;
  if (i >= outputs) return;
  const bool channels_last = p.x_stride[1] == 1 && p.x_stride[3] != 1;
  const int64_t image = p.out_height * p.out_width;
  const int64_t b = i / (image * p.c_out), rest = i % (image * p.c_out);
  const int channel = int(channels_last ? rest % p.c_out : rest / image);
  const PixelPosition at = pixel_position(p, b * image + (channels_last ? rest / p.c_out : rest % image));
  const int cells = p.kernel[0] * p.kernel[1];
  float sum = p.bias != nullptr ? to_float(static_cast<const T*>(p.bias)[channel]) : 0.0f;
  for (int tap = 0; tap < cells; ++tap) {
    const float w = to_float(static_cast<const T*>(p.weight)[int64_t(channel) * cells + tap]);
    sum = fmaf(input_of<T>(p, at, channel, tap, 0), w, sum);
  }
  store_output<T>(p, at, channel, sum);
}

// to[b, channel, i, j] = from[...] for all channels but those in [skip, skip_end).
struct CopyChannelsParams {
  const void* from;
  void* to;
  int64_t from_stride[4], to_stride[4];
  int64_t height, width;
  int32_t batch, channels, skip, skip_end;
};

template <class T>
__global__ void __launch_bounds__(PartialConv2dTraits::kThreads) copy_channels_kernel(CopyChannelsParams p) {
  const int64_t kept = int64_t(p.channels) - (p.skip_end - p.skip), image = p.height * p.width;
  const int64_t i = int64_t(blockIdx.x) * PartialConv2dTraits::kThreads + threadIdx.x;
  if (i >= p.batch * image * kept) return;
  const bool channels_last = p.to_stride[1] == 1 && p.to_stride[3] != 1;
  const int64_t b = i / (image * kept), rest = i % (image * kept);
  int64_t channel = channels_last ? rest % kept : rest / image;
  const int64_t pixel = channels_last ? rest / kept : rest % image;
  if (channel >= p.skip) channel += p.skip_end - p.skip;
  const int64_t y = pixel / p.width, x = pixel % p.width;
  static_cast<T*>(
      p.to)[b * p.to_stride[0] + channel * p.to_stride[1] + y * p.to_stride[2] + x * p.to_stride[3]] =
      static_cast<const T*>(p.from)[b * p.from_stride[0] + channel * p.from_stride[1] + y * p.from_stride[2] +
                                    x * p.from_stride[3]];
}

}  // namespace tranche
