// The gate of channels by their own statistics: what the kernel behind channel_gate receives.
#pragma once

#include "pconv/channel_stats.h"

namespace tranche {

// out[b] = hardsigmoid(weight [mean[b], std[b]] + bias), n = channels - start of each.
struct ChannelGateParams {
  ChannelStatsParams stats;  // mean and std are workspace, in the type that is computed in
  const void* weight;        // [n, 2 n]
  const void* bias;          // [n]
  void* out;                 // [B, n]
};

namespace cpu {
void channel_gate(const ChannelGateParams&);
}

namespace cuda {
void channel_gate(const ChannelGateParams&, void* stream);
}

}  // namespace tranche
