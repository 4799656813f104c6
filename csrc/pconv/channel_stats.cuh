// channel_stats on CUDA: a block measures kChannels channels of one image, each by kLanes threads that take
// every kLanes-th pixel by Welford's recurrence; their results are merged in the order of the lanes, as Chan,
// Golub and LeVeque do. The order knows no layout.
#pragma once

#include <math.h>

#include "core/launch.cuh"
#include "pconv/channel_stats.h"

namespace tranche {

struct ChannelStatsTraits {
  static constexpr int kChannels = 32, kLanes = 8;
  static constexpr int kThreads = kChannels * kLanes;
};

// Block (x, y): channels from x * kChannels of image y, and of the images gridDim.y after it.
// R: the type of mean and std.
template <class T, class R>
__global__ void __launch_bounds__(ChannelStatsTraits::kThreads) channel_stats_kernel(ChannelStatsParams p) {
  constexpr int kChannels = ChannelStatsTraits::kChannels, kLanes = ChannelStatsTraits::kLanes;
  SHARED(float, means, kLanes* kChannels);
  SHARED(float, squares, kLanes* kChannels);
  const int thread = int(threadIdx.x);
  // Neighbouring threads read neighbouring addresses.
  const bool channels_last = p.x_stride[1] == 1 && p.x_stride[3] != 1;
  const int own = channels_last ? thread % kChannels : thread / kLanes;
  const int lane = channels_last ? thread / kChannels : thread % kLanes;
  const int64_t kept = p.channels - p.start, channel = int64_t(blockIdx.x) * kChannels + own;
  const int64_t pixels = p.height * p.width;

  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    float mean = 0.0f, square = 0.0f;
    if (channel < kept) {
      const T* x = static_cast<const T*>(p.x) + b * p.x_stride[0] + (p.start + channel) * p.x_stride[1];
      float count = 0.0f;
      for (int64_t i = lane; i < pixels; i += kLanes) {
        const float value = to_float(x[i / p.width * p.x_stride[2] + i % p.width * p.x_stride[3]]);
        count += 1.0f;
        const float apart = value - mean;
        mean = count == 1.0f ? value : fmaf(apart, 1.0f / count, mean);
        square = count == 1.0f ? 0.0f * value : fmaf(apart, value - mean, square);
      }
    }
    means[lane * kChannels + own] = mean;
    squares[lane * kChannels + own] = square;
    __syncthreads();
    if (lane == 0 && channel < kept) {
      float before = float((pixels + kLanes - 1) / kLanes);
      for (int other = 1; other < kLanes && other < pixels; ++other) {
        const float count = float((pixels - other + kLanes - 1) / kLanes);
        const float share = count / (before + count);
        const float apart = means[other * kChannels + own] - mean;
        square = fmaf(apart * apart, before * share, square + squares[other * kChannels + own]);
        mean = fmaf(apart, share, mean);
        before += count;
      }
      const float nothing = bits_float(0x7fc00000u);  // of no pixels, and for one pixel's deviation
      const int64_t to = b * kept + channel;
      static_cast<R*>(p.mean)[to] = from_float<R>(pixels > 0 ? mean : nothing);
      static_cast<R*>(p.std)[to] = from_float<R>(pixels > 1 ? sqrtf(square / float(pixels - 1)) : nothing);
    }
    __syncthreads();  // before the next image overwrites what is read here
  }
}

// Tiles of channels by images.
template <class T, class R>
void launch_channel_stats(const ChannelStatsParams& p, void* stream) {
  constexpr int kChannels = ChannelStatsTraits::kChannels, kMostImages = 65535;
  const unsigned tiles = unsigned((p.channels - p.start + kChannels - 1) / kChannels);
  const unsigned images = unsigned(p.batch < kMostImages ? p.batch : kMostImages);
  launch("channel_stats", channel_stats_kernel<T, R>,
         {dim3(tiles, images), dim3(ChannelStatsTraits::kThreads)}, stream, p);
}

}  // namespace tranche
