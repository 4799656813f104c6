#include "core/row_silu_mul.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {

void row_silu_mul(const RowSiluMulParams& p, void* stream) {
  constexpr int64_t kThreads = RowSiluMulTraits::kThreads;
  const int64_t parts = (p.width + kThreads - 1) / kThreads;
  if (parts > 65535) {
    throw std::runtime_error("tranche: row_silu_mul: at most 65535 * 256 elements a row, got " +
                             std::to_string(p.width));
  }
  const int64_t rows = p.rows < INT32_MAX ? p.rows : INT32_MAX;
  const LaunchShape shape{dim3(unsigned(rows), unsigned(parts)), dim3(unsigned(kThreads))};
  with_type<float, half, bf16>("row_silu_mul", p.type, [&](auto t) {
    launch("row_silu_mul", row_silu_mul_kernel<decltype(t)>, shape, stream, p);
  });
}

}  // namespace tranche::cuda
