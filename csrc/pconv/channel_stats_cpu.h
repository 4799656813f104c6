// Moments of channels over an image on the CPU.
//
// Pixels are taken in chunks of kChunk, each in two passes (its mean, then squares of what is left), and
// chunks are merged in order as Chan, Golub and LeVeque do. Within a chunk pixel i is added to partial sum
// i % kPartial, whether vector lanes are pixels or channels: the bits do not depend on the layout.
#pragma once

#include "core/parallel.h"
#include "pconv/channel_stats.h"
#include "pconv/lanes_cpu.h"
#include "pconv/layout_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int64_t kChunk = 256, kPartial = 16;
constexpr int64_t kTogether = kLanes;  // channels whose pixels are read together

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
  // A task is an image, or some groups of its channels: chunk by chunk, so that x is read in order.
  constexpr int64_t kMostGroups = 32;
  const int64_t sharers = (num_threads() + p.batch - 1) / most<int64_t>(1, p.batch);
  const int64_t parts = most((groups + kMostGroups - 1) / kMostGroups, least(groups, sharers));
  // Whole pixels of the type that is computed in, equally spaced, are read where they lie; the last group
  // then takes channels of the one before besides its own.
  const bool in_place =
      __is_same(T, A) && kept >= kTogether && p.x_stride[1] == 1 && p.x_stride[2] == p.width * p.x_stride[3];
  const auto some_channels = [&](int64_t task) {
    const int64_t b = task / parts, part = task % parts;
    const int64_t begin = part * groups / parts, end = (part + 1) * groups / parts;
    const T* image = static_cast<const T*>(p.x) + b * p.x_stride[0] + p.start * p.x_stride[1];
    A values[kChunk * kTogether];
    if (!in_place) __builtin_memset(values, 0, sizeof values);
    Moments<A> all[kMostGroups];
    const auto first_of = [&](int64_t group) {
      return in_place ? least(group * kTogether, kept - kTogether) : group * kTogether;
    };
    for (int64_t at = 0; at < pixels; at += kChunk) {
      const int64_t count = least(kChunk, pixels - at);
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = first_of(group);
        const T* x = image + first * p.x_stride[1];
        if (in_place) {
          const A* where = reinterpret_cast<const A*>(x + at * p.x_stride[3]);
          add_chunk(where, p.x_stride[3], count, at, all[group - begin]);
          continue;
        }
        for (int64_t i = 0; i < count;) {  // runs within image rows
          const int64_t column = (at + i) % p.width, run = least(p.width - column, count - i);
          const T* from = x + (at + i) / p.width * p.x_stride[2] + column * p.x_stride[3];
          load_pixels(Pixels<const T>{from, p.x_stride[1], p.x_stride[3]}, run,
                      least(kTogether, kept - first), values + i * kTogether, kTogether);
          i += run;
        }
        add_chunk(values, kTogether, count, at, all[group - begin]);
      }
    }
    for (int64_t i = begin * kTogether; i < least(end * kTogether, kept); ++i) {
      const int64_t group = i / kTogether, lane = i - first_of(group), to = b * kept + i;
      const Moments<A>& moments = all[group - begin];
      // 0 / 0 is NaN: of no pixels, and for one pixel's deviation
      const A variance = moments.square[lane] / A(pixels - 1);
      static_cast<R*>(p.mean)[to] = narrow<R>(pixels > 0 ? moments.mean[lane] : A(__builtin_nan("")));
      static_cast<R*>(p.std)[to] = narrow<R>(pixels > 0 ? A(__builtin_sqrt(variance)) : A(__builtin_nan("")));
    }
  };
  constexpr int64_t kWorthThreads = 65536;  // elements
  if (p.batch * kept * pixels >= kWorthThreads) {
    parallel_for(p.batch * parts, some_channels);
  } else {
    for (int64_t task = 0; task < p.batch * parts; ++task) some_channels(task);
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA
