#include "core/row_rms_norm.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {

void row_rms_norm(const RowRmsNormParams& p, void* stream) {
  if (p.rows > INT32_MAX) {
    throw std::runtime_error("tranche: row_rms_norm: at most 2^31 - 1 rows, got " + std::to_string(p.rows));
  }
  const LaunchShape shape{dim3(unsigned(p.rows)), dim3(RowRmsNormTraits::kThreads)};
  with_type<float, half, bf16>("row_rms_norm", p.type, [&](auto t) {
    launch("row_rms_norm", row_rms_norm_kernel<decltype(t)>, shape, stream, p);
  });
}

}  // namespace tranche::cuda
