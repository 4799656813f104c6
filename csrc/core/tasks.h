// Tasks shared out as workers come to them.
#pragma once

#include <cstddef>

#include "core/parallel.h"

namespace tranche {

// f(task, slot) for each task in [0, tasks). A worker begins with its own part, the same whenever the numbers
// are: what one op wrote, or read, the next one finds in that processor's cache. Whoever is done helps the
// others, so that a worker whose processor has other things to do holds nobody up. `slot` is that of the
// worker, for scratch memory.
template <class F>
inline void parallel_tasks(int64_t tasks, int64_t slots, const F& f) {
  struct alignas(64) Part {  // a line of the cache each
    int64_t next, end;
  };
  Part* parts =
      static_cast<Part*>(__builtin_alloca_with_align(sizeof(Part) * std::size_t(slots), 8 * alignof(Part)));
  for (int64_t i = 0; i < slots; ++i) parts[i] = {tasks * i / slots, tasks * (i + 1) / slots};
  parallel_for(slots, [&](int64_t slot) {
    for (int64_t i = 0; i < slots; ++i) {
      Part& part = parts[(slot + i) % slots];
      for (;;) {
        const int64_t task = __atomic_fetch_add(&part.next, 1, __ATOMIC_RELAXED);
        if (task >= part.end) break;
        f(task, slot);
      }
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
