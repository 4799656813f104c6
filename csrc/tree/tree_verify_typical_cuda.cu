#include "tree/tree_verify_typical.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {

namespace {

template <class T>
void run(const TreeVerifyTypicalParams& p, void* stream) {
  // A tree without nodes still needs the block that says so.
  const dim3 grid(unsigned(p.batch), unsigned(p.nodes > 0 ? p.nodes : 1));
  launch("tree_verify_typical", tree_verify_typical_kernel<T>,
         {grid, dim3(TreeVerifyTypicalTraits::kThreads)}, stream, p);
}

}  // namespace

void tree_verify_typical(const TreeVerifyTypicalParams& p, void* stream) {
  with_type<float, half, bf16>("tree_verify_typical", p.type, [&](auto t) { run<decltype(t)>(p, stream); });
}

}  // namespace tranche::cuda
