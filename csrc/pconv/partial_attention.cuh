// partial_attention on CUDA. norm: kLanes threads a pixel, each every kLanes-th channel. mix: a warp attends
// kRows queries; keys and values come by tiles through shared memory, a lane scores one key of the tile, and
// softmax is taken as keys go by. A block makes some of a head's channels: those of large heads are several
// blocks', which score the same keys.
#pragma once

#include <math.h>

#include "core/launch.cuh"
#include "pconv/partial_attention.h"

namespace tranche {

struct PartialAttentionTraits {
  static constexpr int kThreads = 256;
  static constexpr int kLanes = 16, kPixels = kThreads / kLanes;                              // of norm
  static constexpr int kRows = 4, kQueries = kThreads / 32 * kRows, kKeys = 32, kDepth = 32;  // of mix
  static constexpr int kKeyStep = kDepth + 1;  // so that lanes, which read a column, miss each other's banks
};

__device__ __forceinline__ int64_t attended_channels(const PartialAttentionParams& p) {
  return p.channels - p.start;
}

// Block x: pixels from x * kPixels, of all images.
template <class T>
__global__ void __launch_bounds__(PartialAttentionTraits::kThreads)
    partial_attention_norm_kernel(PartialAttentionParams p) {
  constexpr int kLanes = PartialAttentionTraits::kLanes, kPixels = PartialAttentionTraits::kPixels;
  SHARED(float, sums, kLanes* kPixels);
  const int thread = int(threadIdx.x);
  // Neighbouring threads read neighbouring addresses.
  const bool channels_last = p.x_stride[1] == 1;
  const int own = channels_last ? thread / kLanes : thread % kPixels;
  const int lane = channels_last ? thread % kLanes : thread / kPixels;
  const int64_t n = attended_channels(p), pixel = int64_t(blockIdx.x) * kPixels + own;
  const bool live = pixel < int64_t(p.batch) * p.height * p.width;
  const int64_t row = pixel / p.width;
  const T* x = static_cast<const T*>(p.x) + row / p.height * p.x_stride[0] + p.start * p.x_stride[1] +
               row % p.height * p.x_stride[2] + pixel % p.width * p.x_stride[3];

  // The sum over all lanes, in their order, whichever threads they are.
  const auto total = [&](float sum) {
    sums[lane * kPixels + own] = sum;
    __syncthreads();
    float all = 0.0f;
    for (int i = 0; i < kLanes; ++i) all += sums[i * kPixels + own];
    __syncthreads();
    return all;
  };
  const int64_t end = live ? n : 0;
  float sum = 0.0f;
  for (int64_t c = lane; c < end; c += kLanes) sum += to_float(x[c * p.x_stride[1]]);
  const float mean = total(sum) / float(n);
  float square = 0.0f;
  for (int64_t c = lane; c < end; c += kLanes) {
    const float apart = to_float(x[c * p.x_stride[1]]) - mean;
    square = fmaf(apart, apart, square);
  }
  const float scale = 1.0f / sqrtf(total(square) / float(n) + float(p.eps));
  T* to = static_cast<T*>(p.pixels) + pixel * n;
  for (int64_t c = lane; c < end; c += kLanes) {
    to[c] = from_float<T>((to_float(x[c * p.x_stride[1]]) - mean) * scale);
  }
}

// Block (x, y): queries of one image and head, tiles of queries first, then heads, then images; the head's
// channels from y * 32 * kOwn on.
template <class T, int kOwn>
__global__ void __launch_bounds__(PartialAttentionTraits::kThreads, 2)
    partial_attention_mix_kernel(PartialAttentionParams p) {
  using Traits = PartialAttentionTraits;
  constexpr int kThreads = Traits::kThreads, kRows = Traits::kRows, kQueries = Traits::kQueries;
  constexpr int kKeys = Traits::kKeys, kDepth = Traits::kDepth, kKeyStep = Traits::kKeyStep;
  constexpr int kColumns = 32 * kOwn;
  SHARED(float, queries, kQueries* kDepth);
  SHARED(float, keys, kKeys* kKeyStep);
  SHARED(float, values, kKeys* kColumns);
  SHARED(float, weights, kQueries* kKeys);
  const int thread = int(threadIdx.x), lane = thread % 32, first_row = thread / 32 * kRows;
  const int n = p.channels - p.start, pixels = int(p.height * p.width);  // a bias of HW x HW fits in memory
  const int64_t step = 3 * int64_t(n);
  const int dim = n / p.heads, first_column = int(blockIdx.y) * kColumns;
  const int tiles = (pixels + kQueries - 1) / kQueries;
  const int first_query = int(blockIdx.x) % tiles * kQueries, head_image = int(blockIdx.x) / tiles;
  const int head = head_image % p.heads, image = head_image / p.heads;
  const T* q = static_cast<const T*>(p.products) + int64_t(image) * pixels * step + int64_t(head) * dim;
  const T* bias = static_cast<const T*>(p.bias) + int64_t(head) * pixels * pixels;
  const float scale = 1.0f / sqrtf(float(dim)), nothing = -__builtin_inff();

  // A lane's part of its queries: largest score so far, sum of its own keys' weights, and outputs.
  float top[kRows], sum[kRows], out[kRows][kOwn];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    top[r] = nothing;
    sum[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) out[r][i] = 0.0f;
  }

  for (int first = 0; first < pixels; first += kKeys) {
    float score[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) score[r] = 0.0f;
    for (int d = 0; d < dim; d += kDepth) {
      const int depth = dim - d < kDepth ? dim - d : kDepth;
      __syncthreads();  // the tile before has been read
#pragma unroll 2
      for (int i = thread; i < kQueries * kDepth; i += kThreads) {
        const int query = first_query + i / kDepth;
        const int at = i % kDepth;
        queries[i] = query < pixels && at < depth ? to_float(q[query * step + d + at]) : 0.0f;
      }
#pragma unroll 2
      for (int i = thread; i < kKeys * kDepth; i += kThreads) {
        const int key = first + i / kDepth;
        const int at = i % kDepth;
        keys[i / kDepth * kKeyStep + at] =
            key < pixels && at < depth ? to_float(q[key * step + n + d + at]) : 0.0f;
      }
      __syncthreads();
#pragma unroll 4
      for (int at = 0; at < depth; ++at) {
        const float key = keys[lane * kKeyStep + at];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          score[r] = fmaf(queries[(first_row + r) * kDepth + at], key, score[r]);
        }
      }
    }

    const int key = first + lane;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int query = first_query + first_row + r;
      const bool live = key < pixels && query < pixels;
      const float s = live ? fmaf(score[r], scale, to_float(bias[int64_t(query) * pixels + key])) : nothing;
      float most = s;  // fmaxf passes NaN by; the weight below keeps it
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lanes));
      }
      most = fmaxf(most, top[r]);
      const float base = most == nothing ? 0.0f : most;  // -inf - -inf would be NaN, and keys may follow
      const float weight = expf(s - base), kept = expf(top[r] - base);
      top[r] = most;
      sum[r] = fmaf(sum[r], kept, weight);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) out[r][i] *= kept;
      weights[(first_row + r) * kKeys + lane] = weight;
    }
#pragma unroll 2
    for (int i = thread; i < kKeys * kColumns; i += kThreads) {
      const int from = first + i / kColumns;
      const int column = first_column + i % kColumns;
      values[i] = from < pixels && column < dim ? to_float(q[from * step + 2 * n + column]) : 0.0f;
    }
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < kKeys; ++j) {
      float value[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) value[i] = values[j * kColumns + 32 * i + lane];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float weight = weights[(first_row + r) * kKeys + j];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) out[r][i] = fmaf(weight, value[i], out[r][i]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float all = sum[r];
    for (int lanes = 16; lanes > 0; lanes /= 2) all += __shfl_xor_sync(0xffffffffu, all, lanes);
    const int query = first_query + first_row + r;
    T* to = static_cast<T*>(p.pixels) + (int64_t(image) * pixels + query) * n + int64_t(head) * dim;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int column = first_column + 32 * i + lane;
      if (query < pixels && column < dim) to[column] = from_float<T>(out[r][i] / all);
    }
  }
}

// An element of y each, in the order in which they lie.
template <class T>
__global__ void __launch_bounds__(PartialAttentionTraits::kThreads)
    partial_attention_finish_kernel(PartialAttentionParams p) {
  const int64_t n = attended_channels(p), pixels = p.height * p.width;
  const int64_t i = int64_t(blockIdx.x) * PartialAttentionTraits::kThreads + int(threadIdx.x);
  if (i >= int64_t(p.batch) * p.channels * pixels) return;
  const bool channels_last = p.y_stride[1] == 1;
  const int64_t c = channels_last ? i % p.channels : i / pixels % p.channels;
  const int64_t b = i / pixels / p.channels, pixel = channels_last ? i / p.channels % pixels : i % pixels;
  const int64_t row = pixel / p.width, column = pixel % p.width;
  T x = static_cast<const T*>(
      p.x)[b * p.x_stride[0] + c * p.x_stride[1] + row * p.x_stride[2] + column * p.x_stride[3]];
  if (c >= p.start) {
    const T mixed = static_cast<const T*>(p.products)[(b * pixels + pixel) * n + c - p.start];
    x = from_float<T>(to_float(x) + to_float(mixed));
  }
  static_cast<T*>(p.y)[b * p.y_stride[0] + c * p.y_stride[1] + row * p.y_stride[2] + column * p.y_stride[3]] =
      x;
}

}  // namespace tranche
