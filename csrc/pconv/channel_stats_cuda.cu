#include "pconv/channel_stats.cuh"

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
  switch (p.type) {
    case DType::f32:
      return run<float>(p, stream);
    case DType::f16:
      return run<half>(p, stream);
    case DType::bf16:
      return run<bf16>(p, stream);
    default:
      throw std::runtime_error("tranche: channel_stats: expected f32, f16 or bf16");
  }
}

}  // namespace tranche::cuda
