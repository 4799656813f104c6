// channel_stats on the CPU.
#include "pconv/channel_stats_cpu.h"

#include "core/dispatch.h"
#include "core/isa.h"

namespace tranche::cpu::TRANCHE_ISA {

void channel_stats(const ChannelStatsParams& p) {
  with_type<double, float, half, bf16>("channel_stats", p.type, [&](auto t) {
    using T = decltype(t);
    measure<T, typename compute_type<T>::type, T>(p);
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, channel_stats, ChannelStatsParams)
