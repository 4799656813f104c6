#include "core/limit_math.cuh"

namespace tranche::cuda {

void limit_math(const LimitMathParams& p, void* stream) {
  const LaunchShape shape{dim3(unsigned(p.parts)), dim3(LimitMathTraits::kThreads)};
  switch (p.kind) {
    case MathKind::fp32:
      return launch("limit_math", limit_math_kernel<MathKind::fp32>, shape, stream, p);
    case MathKind::bf16:
      return launch("limit_math", limit_math_kernel<MathKind::bf16>, shape, stream, p);
    case MathKind::int8:
      return launch("limit_math", limit_math_kernel<MathKind::int8>, shape, stream, p);
  }
}

}  // namespace tranche::cuda
