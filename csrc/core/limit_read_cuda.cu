#include "core/limit_read.cuh"

namespace tranche::cuda {

void limit_read(const LimitReadParams& p, void* stream) {
  launch("limit_read", limit_read_kernel, {dim3(unsigned(p.parts)), dim3(LimitReadTraits::kThreads)}, stream,
         p);
}

}  // namespace tranche::cuda
