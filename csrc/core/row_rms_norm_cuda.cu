#include "core/row_rms_norm.cuh"

namespace tranche::cuda {

void row_rms_norm(const RowRmsNormParams& p, void* stream) {
  if (p.rows > INT32_MAX) {
    throw std::runtime_error("tranche: row_rms_norm: at most 2^31 - 1 rows, got " + std::to_string(p.rows));
  }
  const LaunchShape shape{dim3(unsigned(p.rows)), dim3(RowRmsNormTraits::kThreads)};
  switch (p.type) {
    case DType::f32:
      return launch("row_rms_norm", row_rms_norm_kernel<float>, shape, stream, p);
    case DType::f16:
      return launch("row_rms_norm", row_rms_norm_kernel<half>, shape, stream, p);
    case DType::bf16:
      return launch("row_rms_norm", row_rms_norm_kernel<bf16>, shape, stream, p);
    default:
      throw std::runtime_error("tranche: row_rms_norm: float32, float16 and bfloat16 only");
  }
}

}  // namespace tranche::cuda
