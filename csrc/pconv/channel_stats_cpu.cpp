// channel_stats on the CPU.
//
// Pixels are taken in chunks of kChunk, each in two passes (its mean, then squares of what is left), and
// chunks are merged in order as Chan, Golub and LeVeque do. Within a chunk pixel i is added to partial sum
// i % kPartial, whether vector lanes are pixels or channels: the bits do not depend on the layout.
#include "pconv/channel_stats.h"

#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "pconv/layout_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

constexpr int64_t kChunk = 256, kPartial = 16, kTogether = 16;  // channels of a task

template <class A>
struct Moments {
  A mean[kTogether] = {}, square[kTogether] = {};  // square: the sum of (x - mean)^2
};

template <class A>
TRANCHE_INLINE void fold(A (&partial)[kPartial][kTogether]) {
  for (int64_t half = kPartial / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      for (int64_t c = 0; c < kTogether; ++c) partial[i][c] += partial[i + half][c];
    }
  }
}

// values: [count][kTogether].
template <class A>
TRANCHE_INLINE void add_chunk(const A* values, int64_t count, int64_t before, Moments<A>& all) {
  A partial[kPartial][kTogether] = {}, mean[kTogether];
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < kTogether; ++c) partial[i % kPartial][c] += values[i * kTogether + c];
  }
  fold(partial);
  for (int64_t c = 0; c < kTogether; ++c) mean[c] = partial[0][c] / A(count);
  for (int64_t i = 0; i < kPartial; ++i) {
    for (int64_t c = 0; c < kTogether; ++c) partial[i][c] = A(0);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < kTogether; ++c) {
      const A off = values[i * kTogether + c] - mean[c];
      partial[i % kPartial][c] += off * off;
    }
  }
  fold(partial);
  const A share = A(count) / A(before + count), weight = A(before) * share;
  for (int64_t c = 0; c < kTogether; ++c) {
    const A apart = mean[c] - all.mean[c];
    // the first chunk as it is: infinity * 0 would be NaN
    all.square[c] = before == 0 ? partial[0][c] : all.square[c] + partial[0][c] + apart * apart * weight;
    all.mean[c] = before == 0 ? mean[c] : all.mean[c] + apart * share;
  }
}

template <class T, class A>
void measure(const ChannelStatsParams& p) {
  const int64_t kept = p.channels - p.start, groups = (kept + kTogether - 1) / kTogether;
  const int64_t pixels = p.height * p.width;
  parallel_for(p.batch * groups, [&](int64_t task) {
    const int64_t b = task / groups, first = task % groups * kTogether;
    const int64_t live = least(kTogether, kept - first);
    const T* x = static_cast<const T*>(p.x) + b * p.x_stride[0] + (p.start + first) * p.x_stride[1];
    A values[kChunk * kTogether] = {};
    Moments<A> all;
    for (int64_t at = 0; at < pixels; at += kChunk) {
      const int64_t count = least(kChunk, pixels - at);
      for (int64_t i = 0; i < count;) {  // runs within image rows
        const int64_t column = (at + i) % p.width, run = least(p.width - column, count - i);
        const T* from = x + (at + i) / p.width * p.x_stride[2] + column * p.x_stride[3];
        load_pixels(Pixels<const T>{from, p.x_stride[1], p.x_stride[3]}, run, live, values + i * kTogether,
                    kTogether);
        i += run;
      }
      add_chunk(values, count, at, all);
    }
    for (int64_t c = 0; c < live; ++c) {
      const int64_t to = b * kept + first + c;
      // 0 / 0 is NaN: of no pixels, and for one pixel's deviation
      const A variance = all.square[c] / A(pixels - 1);
      static_cast<T*>(p.mean)[to] = narrow<T>(pixels > 0 ? all.mean[c] : A(__builtin_nan("")));
      static_cast<T*>(p.std)[to] = narrow<T>(pixels > 0 ? A(__builtin_sqrt(variance)) : A(__builtin_nan("")));
    }
  });
}

}  // namespace

void channel_stats(const ChannelStatsParams& p) {
  with_type<double, float, half, bf16>("channel_stats", p.type, [&](auto t) {
    using T = decltype(t);
    measure<T, typename compute_type<T>::type>(p);
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, channel_stats, ChannelStatsParams)
