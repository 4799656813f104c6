// Threads for CPU kernels: torch's own pool, reached without a torch header.
#pragma once

#include <cstdint>

namespace tranche {

using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);

// Calls body(context, begin, end) on disjoint ranges that cover [0, tasks). Defined by the op library over
// torch's stable parallel_for, so that there is one thread pool in the process. `body` must not throw.
void parallel_ranges(int64_t tasks, ParallelBody body, void* context);

int num_threads();

// f(task) for each task in [0, tasks). Which thread takes which task is unspecified: a task must compute the
// same bits wherever it runs.
template <class F>
inline void parallel_for(int64_t tasks, const F& f) {
  parallel_ranges(
      tasks,
      [](void* context, int64_t begin, int64_t end) {
        const F& body = *static_cast<const F*>(context);
        for (int64_t task = begin; task < end; ++task) body(task);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace tranche
