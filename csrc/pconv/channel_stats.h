// Mean and standard deviation of channels over an image: what the kernel behind channel_stats receives.
#pragma once

#include <cstdint>

#include "core/numeric.h"

namespace tranche {

// mean[b, i] and std[b, i] (unbiased) of x[b, start + i] over its pixels.
struct ChannelStatsParams {
  const void* x;  // [B, C, H, W]
  void* mean;     // [B, C - start] out
  void* std;      // [B, C - start] out

  int64_t x_stride[4];  // elements
  int64_t height, width;
  int32_t batch, channels, start;
  DType type;  // of all; computed in float, or double for f64
};

namespace cpu {
void channel_stats(const ChannelStatsParams&);
}

namespace cuda {
void channel_stats(const ChannelStatsParams&, void* stream);
}

}  // namespace tranche
