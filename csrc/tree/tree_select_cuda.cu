#include "tree/tree_select.cuh"

namespace tranche::cuda {
namespace {

template <int kPerThread>
void launch_kernel(const TreeSelectParams& p, int threads, void* stream) {
  launch("tree_select", tree_select_kernel<kPerThread>,
         {dim3(unsigned(p.batch)), dim3(unsigned(threads)), tree_select_smem(p.candidates)}, stream, p);
}

}  // namespace

void tree_select(const TreeSelectParams& p, void* stream) {
  if (p.batch == 0) return;
  const int wanted = p.nodes > p.candidates ? p.nodes : p.candidates;
  constexpr int kMost = TreeSelectTraits::kMaxThreads;
  const int threads = wanted < kMost ? (wanted + 31) / 32 * 32 : kMost;
  if (p.candidates <= threads) {
    launch_kernel<1>(p, threads, stream);
  } else {
    launch_kernel<TreeSelectTraits::kPerThread>(p, threads, stream);
  }
}

}  // namespace tranche::cuda
