// tranche::channel_stats: schema, checks, allocation.
#include "pconv/channel_stats.h"

#include "core/torch_glue.h"

namespace tranche {
namespace {

std::tuple<Tensor, Tensor> channel_stats(const Tensor& x, int64_t start) {
  const TensorChecks check("channel_stats");
  check.dim("x", x, 4, "[B, C, H, W]");
#if defined(TRANCHE_BACKEND_CPU)
  check.dtype("x", x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
#else
  check.dtype("x", x, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
#endif
  for (int i = 0; i < 4; ++i) {
    check.that(x.size(i) <= INT32_MAX, "sizes of x below 2^31", shape_text(x), "Cut the input in pieces.");
  }
  check.that(start >= 0 && start <= x.size(1), concat("start in [0, x.size(1)] = [0, ", x.size(1), "]"),
             start, "The channels from start on are measured.");
  const Tensor mean = empty_on(x, {x.size(0), x.size(1) - start}, x.scalar_type());
  const Tensor std = empty_on(x, {x.size(0), x.size(1) - start}, x.scalar_type());
  if (mean.numel() == 0) return {mean, std};
  ChannelStatsParams p{};
  p.x = x.const_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.std = std.mutable_data_ptr();
  for (int i = 0; i < 4; ++i) p.x_stride[i] = x.stride(i);
  p.height = x.size(2);
  p.width = x.size(3);
  p.batch = int32_t(x.size(0));
  p.channels = int32_t(x.size(1));
  p.start = int32_t(start);
  p.type = dtype_of_tensor(x);
  RUN_KERNEL(channel_stats, p, x, mean, std);
  return {mean, std};
}

REGISTER_OP(channel_stats, "(Tensor x, SymInt start) -> (Tensor mean, Tensor std)")

}  // namespace
}  // namespace tranche
