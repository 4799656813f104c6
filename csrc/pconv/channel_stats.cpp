// tranche::channel_stats: schema, checks, allocation.
#include "pconv/channel_stats_glue.h"

namespace tranche {
namespace {

std::tuple<Tensor, Tensor> channel_stats(const Tensor& x, int64_t start) {
  const TensorChecks check("channel_stats");
  check_measured(check, x, start);
  const Tensor mean = empty_on(x, {x.size(0), x.size(1) - start}, x.scalar_type());
  const Tensor std = empty_on(x, {x.size(0), x.size(1) - start}, x.scalar_type());
  if (mean.numel() == 0) return {mean, std};
  const ChannelStatsParams p = stats_params(x, start, mean.mutable_data_ptr(), std.mutable_data_ptr());
  RUN_KERNEL(channel_stats, p, x, mean, std);
  return {mean, std};
}

REGISTER_OP(channel_stats, "(Tensor x, SymInt start) -> (Tensor mean, Tensor std)")

}  // namespace
}  // namespace tranche
