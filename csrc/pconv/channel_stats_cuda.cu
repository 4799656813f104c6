#include "pconv/channel_stats.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {

void channel_stats(const ChannelStatsParams& p, void* stream) {
  with_type<float, half, bf16>("channel_stats", p.type, [&](auto t) {
    using T = decltype(t);
    launch_channel_stats<T, T>(p, stream);
  });
}

}  // namespace tranche::cuda
