#include "pconv/channel_gate.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {

void channel_gate(const ChannelGateParams& p, void* stream) {
  with_type<float, half, bf16>("channel_gate", p.stats.type, [&](auto t) {
    using T = decltype(t);
    constexpr int kWarps = ChannelGateTraits::kWarps, kMostImages = 65535;
    launch_channel_stats<T, float>(p.stats, stream);
    const unsigned rows = unsigned((p.stats.channels - p.stats.start + kWarps - 1) / kWarps);
    const unsigned images = unsigned(p.stats.batch < kMostImages ? p.stats.batch : kMostImages);
    launch("channel_gate", channel_gate_kernel<T>, {dim3(rows, images), dim3(ChannelGateTraits::kThreads)},
           stream, p);
  });
}

}  // namespace tranche::cuda
