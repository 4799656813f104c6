// Moments of channels over an image on the CPU.
//
// Pixels are taken in chunks of kChunk, each in two passes (its mean, then squares of what is left), and
// chunks are merged in order as Chan, Golub and LeVeque do. Within a chunk pixel i is added to partial sum
// i % kPartial, whether vector lanes are pixels or channels: the bits do not depend on the layout.
#pragma once

#include "core/parallel.h"
#include "pconv/channel_stats.h"
#include "pconv/layout_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int64_t kChunk = 256, kPartial = 16, kTogether = 16;  // channels of a task

// One value of each channel of a task.
template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(kTogether * sizeof(A))));
};

template <class A>
struct Moments {
  typename LanesOf<A>::type mean = {}, square = {};  // square: the sum of (x - mean)^2
};

// out = the sum of what f adds for each of `count` pixels of kTogether channels, `step` elements apart. Lanes
// go by reference: passed by value they would depend on the instruction set's calling convention.
template <class A, class F>
TRANCHE_INLINE void add_up(const A* values, int64_t step, int64_t count, typename LanesOf<A>::type& out,
                           const F& f) {
  typename LanesOf<A>::type partial[kPartial] = {};
  for (int64_t i = 0; i < count; i += kPartial) {
    const bool whole = i + kPartial <= count;
    // Numbers of partial sums are constants, or these would live in memory.
#pragma GCC unroll 16
    for (int64_t r = 0; r < kPartial; ++r) {
      if (!whole && i + r >= count) break;
      typename LanesOf<A>::type pixel;
      __builtin_memcpy(&pixel, values + (i + r) * step, sizeof pixel);
      f(pixel, partial[r]);
    }
  }
#pragma GCC unroll 4
  for (int64_t half = kPartial / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < half; ++r) partial[r] += partial[r + half];
  }
  out = partial[0];
}

template <class A>
TRANCHE_INLINE void add_chunk(const A* values, int64_t step, int64_t count, int64_t before, Moments<A>& all) {
  using Lanes = typename LanesOf<A>::type;
  Lanes mean, square;
  add_up(values, step, count, mean, [](const Lanes& pixel, Lanes& sum) { sum += pixel; });
  mean /= A(count);
  add_up(values, step, count, square, [&](const Lanes& pixel, Lanes& sum) {
    const Lanes off = pixel - mean;
    sum += off * off;
  });
  // the first chunk as it is: infinity * 0 would be NaN
  if (before == 0) {
    all.mean = mean, all.square = square;
    return;
  }
  const A share = A(count) / A(before + count), weight = A(before) * share;
  const Lanes apart = mean - all.mean;
  all.square = all.square + square + apart * apart * weight;
  all.mean += apart * share;
}

// mean and std of type R, from x of type T, computed in A.
template <class T, class A, class R>
static void measure(const ChannelStatsParams& p) {
  const int64_t kept = p.channels - p.start, groups = (kept + kTogether - 1) / kTogether;
  const int64_t pixels = p.height * p.width;
  const auto some_channels = [&](int64_t task) {
    const int64_t b = task / groups, first = task % groups * kTogether;
    const int64_t live = least(kTogether, kept - first);
    const T* x = static_cast<const T*>(p.x) + b * p.x_stride[0] + (p.start + first) * p.x_stride[1];
    A values[kChunk * kTogether] = {};
    Moments<A> all;
    // Whole pixels of the type that is computed in, equally spaced, are read where they lie.
    const bool in_place = __is_same(T, A) && live == kTogether && p.x_stride[1] == 1 &&
                          p.x_stride[2] == p.width * p.x_stride[3];
    for (int64_t at = 0; at < pixels; at += kChunk) {
      const int64_t count = least(kChunk, pixels - at);
      if (in_place) {
        add_chunk(reinterpret_cast<const A*>(x + at * p.x_stride[3]), p.x_stride[3], count, at, all);
        continue;
      }
      for (int64_t i = 0; i < count;) {  // runs within image rows
        const int64_t column = (at + i) % p.width, run = least(p.width - column, count - i);
        const T* from = x + (at + i) / p.width * p.x_stride[2] + column * p.x_stride[3];
        load_pixels(Pixels<const T>{from, p.x_stride[1], p.x_stride[3]}, run, live, values + i * kTogether,
                    kTogether);
        i += run;
      }
      add_chunk(values, kTogether, count, at, all);
    }
    for (int64_t c = 0; c < live; ++c) {
      const int64_t to = b * kept + first + c;
      // 0 / 0 is NaN: of no pixels, and for one pixel's deviation
      const A variance = all.square[c] / A(pixels - 1);
      static_cast<R*>(p.mean)[to] = narrow<R>(pixels > 0 ? all.mean[c] : A(__builtin_nan("")));
      static_cast<R*>(p.std)[to] = narrow<R>(pixels > 0 ? A(__builtin_sqrt(variance)) : A(__builtin_nan("")));
    }
  };
  constexpr int64_t kWorthThreads = 65536;  // elements
  if (p.batch * kept * pixels >= kWorthThreads) {
    parallel_for(p.batch * groups, some_channels);
  } else {
    for (int64_t task = 0; task < p.batch * groups; ++task) some_channels(task);
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA
