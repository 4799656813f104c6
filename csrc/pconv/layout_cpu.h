// Pixels by channels between tensors in any layout and dense scratch.
#pragma once

#include "core/arena.h"
#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

template <class A, class T>
TRANCHE_INLINE A widen(T x) {
  if constexpr (__is_same(T, A)) {
    return x;
  } else {
    return to_float(x);
  }
}

template <class T, class A>
TRANCHE_INLINE T narrow(A x) {
  if constexpr (__is_same(T, A)) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

// The first n of 16 lanes; a whole vector goes without a mask, which some processors store slowly.
#if defined(__AVX512F__)
template <class T>
TRANCHE_INLINE void store_lanes(T* to, Vec x, int64_t n) {
  n >= 16 ? store16(to, x, 16) : store16(to, x, int(n));
}
#endif

// n elements, few: no call.
template <class T>
TRANCHE_INLINE void copy_row(const T* from, T* to, int64_t n) {
#if defined(__AVX512F__)
  const int64_t bytes = n * int64_t(sizeof(T));
  const char* source = reinterpret_cast<const char*>(from);
  char* target = reinterpret_cast<char*>(to);
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) _mm512_storeu_si512(target + i, _mm512_loadu_si512(source + i));
  if (i + 32 <= bytes) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), half);
    i += 32;
  }
  if (i < bytes) {
    const __mmask32 mask = (__mmask32(1) << (bytes - i)) - 1;
    _mm256_mask_storeu_epi8(target + i, mask, _mm256_maskz_loadu_epi8(mask, source + i));
  }
#else
  __builtin_memcpy(to, from, size_t(n) * sizeof(T));
#endif
}

// n elements of type T to X: float, double, or T itself.
template <class T, class X>
TRANCHE_INLINE void load_row(const T* from, X* to, int64_t n) {
  if constexpr (__is_same(T, X)) {
    copy_row(from, to, n);
  } else {
    row_to_float(from, to, int(n));
  }
}

// n sums to elements of type T. `from` may be read up to a multiple of 16.
template <class T, class A>
TRANCHE_INLINE void store_row(const A* from, T* to, int64_t n) {
  if constexpr (__is_same(T, A)) {
    copy_row(from, to, n);
  } else {
#if defined(__AVX512F__)
    for (int64_t i = 0; i < n; i += 16) store_lanes(to + i, vload(from + i), n - i);
#else
    for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(from[i]);
#endif
  }
}

// A run of pixels in a tensor: element c of pixel i is at data[c * channel + i * pixel].
template <class T>
struct Pixels {
  T* data;
  int64_t channel, pixel;
};

// to[i * step + c] = element c of pixel i.
template <class T, class X>
static void load_pixels(const Pixels<const T>& from, int64_t pixels, int64_t channels, X* to, int64_t step) {
  if (from.channel == 1) {
    const bool dense = from.pixel == channels && step == channels && channels * pixels < int64_t(1) << 31;
    if (dense) channels *= pixels, pixels = 1;
    for (int64_t i = 0; i < pixels; ++i) load_row(from.data + i * from.pixel, to + i * step, channels);
    return;
  }
  int64_t done = 0;
#if defined(__AVX512F__)
  if constexpr (!__is_same(T, double)) {
    for (; from.pixel == 1 && done < channels; done += 16) {
      const int live = int(least<int64_t>(16, channels - done));
      const __mmask16 mask = __mmask16((1u << live) - 1u);
      for (int64_t i = 0; i < pixels; i += 16) {
        const int count = int(least<int64_t>(16, pixels - i));
        __m512i block[16];
#pragma GCC unroll 16
        for (int c = 0; c < 16; ++c) {
          const T* plane = from.data + (done + c) * from.channel + i;
          block[c] = c < live ? _mm512_castps_si512(load16(plane, count)) : _mm512_setzero_si512();
        }
        transpose16(block);
        X* row = to + i * step + done;
        for (int r = 0; r < count; ++r, row += step) {
          if constexpr (__is_same(X, bf16)) {
            const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(block[r], 16));
            _mm256_mask_storeu_epi16(row, mask, bits);
          } else {
            _mm512_mask_storeu_ps(row, mask, _mm512_castsi512_ps(block[r]));
          }
        }
      }
    }
  }
#endif
  for (int64_t c = done; c < channels; ++c) {
    const T* plane = from.data + c * from.channel;
    for (int64_t i = 0; i < pixels; ++i) to[i * step + c] = widen<X>(plane[i * from.pixel]);
  }
}

// Element c of pixel i = from[i * step + c], which may be read up to a multiple of 16 channels.
template <class T, class A>
static void store_pixels(const A* from, int64_t step, int64_t pixels, int64_t channels, const Pixels<T>& to) {
  if (to.channel == 1) {
    const bool dense = to.pixel == channels && step == channels;
    if (dense) channels *= pixels, pixels = 1;
    for (int64_t i = 0; i < pixels; ++i) store_row(from + i * step, to.data + i * to.pixel, channels);
    return;
  }
  int64_t done = 0;
#if defined(__AVX512F__)
  if constexpr (!__is_same(T, double)) {
    for (; to.pixel == 1 && done < channels; done += 16) {
      const int live = int(least<int64_t>(16, channels - done));
      for (int64_t i = 0; i < pixels; i += 16) {
        const int count = int(least<int64_t>(16, pixels - i));
        __m512i block[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          block[r] = r < count ? _mm512_loadu_si512(from + (i + r) * step + done) : _mm512_setzero_si512();
        }
        transpose16(block);
        T* plane = to.data + done * to.channel + i;
        for (int c = 0; c < live; ++c, plane += to.channel) {
          store16(plane, _mm512_castsi512_ps(block[c]), count);
        }
      }
    }
  }
#endif
  for (int64_t c = done; c < channels; ++c) {
    T* plane = to.data + c * to.channel;
    for (int64_t i = 0; i < pixels; ++i) plane[i * to.pixel] = narrow<T>(from[i * step + c]);
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA
