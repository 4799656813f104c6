#include "pconv/channel_stats.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {
namespace {

template <class T>
void run(const ChannelStatsParams& p, void* stream) {
  constexpr int kChannels = ChannelStatsTraits::kChannels, kMostImages = 65535;
  const unsigned tiles = unsigned((p.channels - p.start + kChannels - 1) / kChannels);
  const unsigned images = unsigned(p.batch < kMostImages ? p.batch : kMostImages);
  launch("channel_stats", channel_stats_kernel<T>, {dim3(tiles, images), dim3(ChannelStatsTraits::kThreads)},
         stream, p);
}

}  // namespace

void channel_stats(const ChannelStatsParams& p, void* stream) {
  with_type<float, half, bf16>("channel_stats", p.type, [&](auto t) { run<decltype(t)>(p, stream); });
}

}  // namespace tranche::cuda
