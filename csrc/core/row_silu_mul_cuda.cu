#include "core/row_silu_mul.cuh"

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
  switch (p.type) {
    case DType::f32:
      return launch("row_silu_mul", row_silu_mul_kernel<float>, shape, stream, p);
    case DType::f16:
      return launch("row_silu_mul", row_silu_mul_kernel<half>, shape, stream, p);
    case DType::bf16:
      return launch("row_silu_mul", row_silu_mul_kernel<bf16>, shape, stream, p);
    default:
      throw std::runtime_error("tranche: row_silu_mul: float32, float16 and bfloat16 only");
  }
}

}  // namespace tranche::cuda
