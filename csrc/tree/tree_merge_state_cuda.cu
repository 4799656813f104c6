#include "tree/tree_merge_state.cuh"

namespace tranche::cuda {

void tree_merge_state(const TreeMergeStateParams& p, void* stream) {
  constexpr int kRows = TreeMergeStateTraits::kRows;
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  if (blocks > INT32_MAX) {
    throw std::runtime_error("tranche: tree_merge_state: at most 2^33 rows, got " + std::to_string(p.rows));
  }
  const LaunchShape shape{dim3(unsigned(blocks)), dim3(TreeMergeStateTraits::kThreads)};
  switch (p.type) {
    case DType::f32:
      return launch("tree_merge_state", tree_merge_state_kernel<float>, shape, stream, p);
    case DType::f16:
      return launch("tree_merge_state", tree_merge_state_kernel<half>, shape, stream, p);
    case DType::bf16:
      return launch("tree_merge_state", tree_merge_state_kernel<bf16>, shape, stream, p);
    default:
      throw std::runtime_error("tranche: tree_merge_state: float32, float16 and bfloat16 only");
  }
}

}  // namespace tranche::cuda
