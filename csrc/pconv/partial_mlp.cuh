// The 1x1 layers of partial_mlp as one matrix product each: pixels times outputs, the first layer's left
// matrix put together from the convolution's results and x as they lie. Sums are float, in one chain per
// output with k ascending.
#pragma once

#include <math.h>

#include "core/launch.cuh"
#include "core/ptx.cuh"
#include "pconv/hardsigmoid.cuh"
#include "pconv/partial_mlp.h"

namespace tranche {

struct PartialMlpTraits {
  static constexpr int kThreads = 256;
  static constexpr int kPixels = 128;  // of a block
  static constexpr int kOutputs = 16;  // of a block
  static constexpr int kDepth = 16;    // products between two barriers
  static constexpr int kOwn = 8;       // outputs of a thread, all of one pixel
  static_assert(kPixels * kOutputs == kThreads * kOwn);
  static_assert(kPixels * kDepth % kThreads == 0 && kDepth * kOutputs <= kThreads);
};

struct PartialMlpLayerParams {
  PartialMlpParams mlp;
  const void* convolved;  // [pixels, convolved_stride]
  void* hidden;           // [pixels, hidden_stride]
  int64_t convolved_stride, hidden_stride;
  bool dense;  // eight channels of x from a multiple of eight on are 16 aligned bytes
};

__device__ __forceinline__ float activate(PartialMlpParams::Activation activation, float x) {
  if (activation == PartialMlpParams::Activation::relu) return x < 0.0f ? 0.0f : x;
  return 0.5f * x * erfcf(-x * 0.70710678118654752f);
}

// Where channel 0 of a pixel lies.
__device__ __forceinline__ int64_t pixel_offset(const PartialMlpParams& p, const int64_t (&stride)[4],
                                                int64_t pixel) {
  const int64_t row = pixel / p.width;
  return row / p.height * stride[0] + row % p.height * stride[2] + pixel % p.width * stride[3];
}

// Element k of the first layer's input.
template <class T>
__device__ __forceinline__ float mixed_channel(const PartialMlpLayerParams& layer, int64_t pixel, int k) {
  const PartialMlpParams& p = layer.mlp;
  if (k < p.convolved)
    return to_float(static_cast<const T*>(layer.convolved)[pixel * layer.convolved_stride + k]);
  const int64_t at = pixel_offset(p, p.x_stride, pixel) + k * p.x_stride[1];
  const float value = to_float(static_cast<const T*>(p.x)[at]);
  if (p.gate == nullptr) return value;
  const int64_t kept = p.channels - p.convolved, b = pixel / (p.height * p.width);
  return value * to_float(static_cast<const T*>(p.gate)[b * kept + k - p.convolved]);
}

// Block (x, y): pixels from x * kPixels, outputs from y * kOutputs.
template <class T, bool kSecond>
__global__ void __launch_bounds__(PartialMlpTraits::kThreads)
    partial_mlp_layer_kernel(PartialMlpLayerParams layer) {
  using Traits = PartialMlpTraits;
  constexpr int kPixels = Traits::kPixels, kOutputs = Traits::kOutputs, kDepth = Traits::kDepth;
  constexpr int kOwn = Traits::kOwn, kThreads = Traits::kThreads;
  constexpr int kRow = kPixels + 1;  // lanes of one pixel and of one product both miss each other's banks
  SHARED(float, inputs, kDepth* kRow);
  SHARED(float, weights, kDepth* kOutputs);
  SHARED(float, spatial, kDepth);

  const PartialMlpParams& p = layer.mlp;
  const int depth = kSecond ? p.hidden : p.channels, outputs = kSecond ? p.channels : p.hidden;
  const T* weight = static_cast<const T*>(kSecond ? p.w2 : p.w1);
  const int64_t pixels = p.batch * p.height * p.width, first_pixel = int64_t(blockIdx.x) * kPixels;
  const int first_output = int(blockIdx.y) * kOutputs, thread = int(threadIdx.x);
  // Neighbouring lanes read neighbouring addresses: channels where they are dense, pixels elsewhere.
  const bool channels_last = kSecond || (p.x_stride[1] == 1 && p.x_stride[3] != 1);
  const bool gated = kSecond && p.spatial_weight != nullptr;

  const int own_pixel = thread % kPixels, own_first = thread / kPixels * kOwn;
  float sum[kOwn], score = 0.0f;
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int output = first_output + own_first + o;
    sum[o] = !kSecond && output < outputs ? to_float(static_cast<const T*>(p.b1)[output]) : 0.0f;
  }

  for (int first = 0; first < depth; first += kDepth) {
    for (int i = thread; i < kPixels * kDepth; i += kThreads) {
      const int k = channels_last ? i % kDepth : i / kPixels;
      const int pixel = channels_last ? i / kDepth : i % kPixels;
      float value = 0.0f;
      if (first + k < depth && first_pixel + pixel < pixels) {
        value = kSecond ? to_float(static_cast<const T*>(
                              layer.hidden)[(first_pixel + pixel) * layer.hidden_stride + first + k])
                        : mixed_channel<T>(layer, first_pixel + pixel, first + k);
      }
      inputs[k * kRow + pixel] = value;
    }
    if (thread < kDepth * kOutputs) {
      const int k = thread / kOutputs, output = first_output + thread % kOutputs;
      const bool live = first + k < depth && output < outputs;
      weights[thread] = live ? to_float(weight[int64_t(output) * depth + first + k]) : 0.0f;
    }
    if (gated && thread < kDepth) {
      const bool live = first + thread < depth;
      spatial[thread] = live ? to_float(static_cast<const T*>(p.spatial_weight)[first + thread]) : 0.0f;
    }
    __syncthreads();
    const int live = depth - first < kDepth ? depth - first : kDepth;
    for (int k = 0; k < live; ++k) {
      const float x = inputs[k * kRow + own_pixel];
      if (gated) score = fmaf(x, spatial[k], score);
#pragma unroll
      for (int o = 0; o < kOwn; ++o) sum[o] = fmaf(x, weights[k * kOutputs + own_first + o], sum[o]);
    }
    __syncthreads();  // before the next round overwrites what others read here
  }

  const int64_t pixel = first_pixel + own_pixel;
  if (pixel >= pixels) return;
  if (gated && p.spatial_bias != nullptr) score += to_float(*static_cast<const T*>(p.spatial_bias));
  const float scale = hardsigmoid(score);
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int output = first_output + own_first + o;
    if (output >= outputs) break;
    if constexpr (kSecond) {
      float value = sum[o];
      if (gated && output < p.channels - p.channels / 2) value *= scale;
      value += to_float(static_cast<const T*>(p.b2)[output]);
      if (p.residual) {
        const int64_t at = pixel_offset(p, p.x_stride, pixel) + output * p.x_stride[1];
        value += to_float(static_cast<const T*>(p.x)[at]);
      }
      const int64_t at = pixel_offset(p, p.y_stride, pixel) + output * p.y_stride[1];
      static_cast<T*>(p.y)[at] = from_float<T>(value);
    } else {
      static_cast<T*>(layer.hidden)[pixel * layer.hidden_stride + output] =
          from_float<T>(activate(p.activation, sum[o]));
    }
  }
}

}  // namespace tranche
