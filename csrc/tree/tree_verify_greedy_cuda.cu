#include "tree/tree_verify_greedy.cuh"

namespace tranche::cuda {

void tree_verify_greedy(const TreeVerifyGreedyParams& p, void* stream) {
  if (p.nodes > kMaxTreeNodes) {
    throw std::runtime_error("tranche: tree_verify_greedy: a tree has at most " +
                             std::to_string(kMaxTreeNodes) + " nodes, got " + std::to_string(p.nodes));
  }
  launch("tree_verify_greedy", tree_verify_greedy_kernel,
         {dim3(unsigned(p.batch)), dim3(TreeVerifyGreedyTraits::kThreads)}, stream, p);
}

}  // namespace tranche::cuda
