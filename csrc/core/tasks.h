// Tasks shared out as workers come to them.
#pragma once

#include "core/parallel.h"

namespace tranche {

// f(task, slot) for each task in [0, tasks), each by whichever of `slots` workers comes to it first: a worker
// whose processor has other things to do holds nobody up. `slot` is that of the worker, for scratch memory.
template <class F>
inline void parallel_tasks(int64_t tasks, int64_t slots, const F& f) {
  int64_t next = 0;
  parallel_for(slots, [&](int64_t slot) {
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) break;
      f(task, slot);
    }
  });
}

}  // namespace tranche
