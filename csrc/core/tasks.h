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

// f(begin, end, slot) on consecutive ranges that cover [0, tasks), each taken by whichever of `slots` workers
// comes to it first: long ones first, since memory is read faster in order, and shorter and shorter ones, so
// that all end together.
template <class F>
inline void parallel_shares(int64_t tasks, int64_t slots, const F& f) {
  int64_t next = 0;
  parallel_for(slots, [&](int64_t slot) {
    int64_t begin = __atomic_load_n(&next, __ATOMIC_RELAXED);
    while (begin < tasks) {
      const int64_t share = (tasks - begin) / (2 * slots), end = begin + (share > 1 ? share : 1);
      if (!__atomic_compare_exchange_n(&next, &begin, end, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        continue;
      f(begin, end, slot);
      begin = __atomic_load_n(&next, __ATOMIC_RELAXED);
    }
  });
}

}  // namespace tranche
