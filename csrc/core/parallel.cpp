// The one bridge from CPU kernels to torch's thread pool.
#include "core/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace tranche {

void parallel_ranges(int64_t tasks, ParallelBody body, void* context) {
  if (tasks <= 0) return;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

int num_threads() { return int(torch::stable::get_num_threads()); }

}  // namespace tranche
