// What the ops that measure channels share: checks of x and start, and the kernel's view of them.
#pragma once

#include "pconv/channel_stats.h"
#include "pconv/image_glue.h"

namespace tranche {

inline void check_measured(const TensorChecks& check, const Tensor& x, int64_t start) {
  check_images(check, x);
  check.that(start >= 0 && start <= x.size(1), concat("start in [0, x.size(1)] = [0, ", x.size(1), "]"),
             start, "The channels from start on are measured.");
}

inline ChannelStatsParams stats_params(const Tensor& x, int64_t start, void* mean, void* std) {
  ChannelStatsParams p{};
  p.x = x.const_data_ptr();
  p.mean = mean;
  p.std = std;
  for (int i = 0; i < 4; ++i) p.x_stride[i] = x.stride(i);
  p.height = x.size(2);
  p.width = x.size(3);
  p.batch = int32_t(x.size(0));
  p.channels = int32_t(x.size(1));
  p.start = int32_t(start);
  p.type = dtype_of_tensor(x);
  return p;
}

}  // namespace tranche
