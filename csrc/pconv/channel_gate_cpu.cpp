// channel_gate on the CPU: moments, then products of a few rows of the weight with those of every image.
// Vector lanes run along a row and are added by a fixed tree: an image's bits do not depend on its
// neighbours.
#include "pconv/channel_gate.h"

#include "core/activation_cpu.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "pconv/channel_stats_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

constexpr int kRows = 4;  // rows together, for their sums to be added side by side

// The first n of 16 elements, the others 0.
template <class T, class A>
TRANCHE_INLINE void load_lanes_of(const T* from, int64_t n, typename LanesOf<A>::type& out) {
  if constexpr (__is_same(T, A)) {
    if (n == kLanes) {
      __builtin_memcpy(&out, from, sizeof out);
      return;
    }
  }
  A values[kLanes];
  load_row(from, values, n);
  for (int64_t i = n; i < kLanes; ++i) values[i] = A(0);
  __builtin_memcpy(&out, values, sizeof out);
}

// sums[r] += row r of the weight times n moments, lane by lane. Rows beyond `rows` are the last one again:
// with a number of them that is known, the sums stay in registers.
template <class T, class A>
TRANCHE_INLINE void multiply(const T* weight, int64_t stride, int64_t rows, const A* moments, int64_t n,
                             typename LanesOf<A>::type (&sums)[kRows]) {
  for (int64_t k = 0; k < n; k += kLanes) {
    const int64_t live = least<int64_t>(kLanes, n - k);
    typename LanesOf<A>::type moment, w;
    load_lanes_of<A, A>(moments + k, live, moment);
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRows; ++r) {
      load_lanes_of<T, A>(weight + least(r, rows - 1) * stride + k, live, w);
      sums[r] += w * moment;
    }
  }
}

template <class T, class A>
void gate(const ChannelGateParams& p) {
  measure<T, A, A>(p.stats);
  const int64_t n = p.stats.channels - p.stats.start, tasks = (n + kRows - 1) / kRows;
  const auto some_rows = [&](int64_t task) {
    const int64_t first = task * kRows, rows = least<int64_t>(kRows, n - first);
    const T* weight = static_cast<const T*>(p.weight) + first * 2 * n;
    for (int64_t b = 0; b < p.stats.batch; ++b) {
      typename LanesOf<A>::type sums[kRows] = {};
      multiply<T, A>(weight, 2 * n, rows, static_cast<const A*>(p.stats.mean) + b * n, n, sums);
      multiply<T, A>(weight + n, 2 * n, rows, static_cast<const A*>(p.stats.std) + b * n, n, sums);
      for (int64_t r = 0; r < rows; ++r) {
        const A bias = widen<A>(static_cast<const T*>(p.bias)[first + r]);
        static_cast<T*>(p.out)[b * n + first + r] = narrow<T>(hardsigmoid(sum_of<A>(sums[r]) + bias));
      }
    }
  };
  constexpr int64_t kWorthThreads = 65536;  // products
  if (p.stats.batch * n * 2 * n >= kWorthThreads) {
    parallel_for(tasks, some_rows);
  } else {
    for (int64_t task = 0; task < tasks; ++task) some_rows(task);
  }
}

}  // namespace

void channel_gate(const ChannelGateParams& p) {
  with_type<double, float, half, bf16>("channel_gate", p.stats.type, [&](auto t) {
    using T = decltype(t);
    gate<T, typename compute_type<T>::type>(p);
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, channel_gate, ChannelGateParams)
