#include "tree/tree_ancestors.cuh"

namespace tranche::cuda {

void tree_ancestors(const TreeAncestorsParams& p, void* stream) {
  if (p.batch == 0 || p.nodes == 0) return;
  if (p.nodes > kMaxTreeNodes) {
    throw std::runtime_error("tranche: tree_ancestors: a tree has at most " + std::to_string(kMaxTreeNodes) +
                             " nodes, got " + std::to_string(p.nodes));
  }
  const unsigned threads = unsigned(p.nodes + 31) / 32 * 32;
  launch("tree_ancestors", tree_ancestors_kernel, {dim3(unsigned(p.batch)), dim3(threads)}, stream, p);
}

}  // namespace tranche::cuda
