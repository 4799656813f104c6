#include "tree/tree_merge_state.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {

void tree_merge_state(const TreeMergeStateParams& p, void* stream) {
  constexpr int kRows = TreeMergeStateTraits::kRows;
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  if (blocks > INT32_MAX) {
    throw std::runtime_error("tranche: tree_merge_state: at most 2^33 rows, got " + std::to_string(p.rows));
  }
  const LaunchShape shape{dim3(unsigned(blocks)), dim3(TreeMergeStateTraits::kThreads)};
  with_type<float, half, bf16>("tree_merge_state", p.type, [&](auto t) {
    launch("tree_merge_state", tree_merge_state_kernel<decltype(t)>, shape, stream, p);
  });
}

}  // namespace tranche::cuda
