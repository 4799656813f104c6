// Twelve chains hide the latency of two multiply-add units.
#include <cstring>

#include "core/isa.h"
#include "core/limit_math.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

constexpr int kChains = 12;

struct Work {
  double operations, checksum;
};

template <class V, class Step>
Work run_chains(int64_t iterations, double operations_per_step, V start, const Step& step) {
  // Every loop over the chains is unrolled: an array that is indexed at run time would live in memory, and
  // its loads and stores, not the arithmetic, would be the limit measured.
  V chain[kChains];
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) chain[c] = start;
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      chain[c] = step(chain[c]);
      keep_in_register(chain[c]);  // and nobody sees that a chain is linear, and closes it
    }
  }
  float first[sizeof(V) / sizeof(float)];
  double checksum = 0;
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) {
    const V last = chain[c];
    memcpy(first, &last, sizeof first);
    checksum += first[0];
  }
  return {operations_per_step * kChains * double(iterations), checksum};
}

#if defined(__AVX512F__)
Work fp32_chains(int64_t n) {
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.5f);
  return run_chains(n, 32, b, [&](__m512 c) { return _mm512_fmadd_ps(c, a, b); });
}
#if !defined(__AMX_TILE__)
Work int8_chains(int64_t n) {
  const __m512i a = _mm512_set1_epi8(3);
  return run_chains(n, 128, a, [&](__m512i c) { return _mm512_dpbusd_epi32(c, a, a); });
}
Work bf16_chains(int64_t n) {
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00);
  return run_chains(n, 64, _mm512_set1_ps(0.5f), [&](__m512 c) { return _mm512_dpbf16_ps(c, a, a); });
}
#endif
#elif defined(__AVX2__)
Work fp32_chains(int64_t n) {
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.5f);
  return run_chains(n, 16, b, [&](__m256 c) { return _mm256_fmadd_ps(c, a, b); });
}
Work int8_chains(int64_t n) {
  const __m256i a = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  return run_chains(n, 64, a, [&](__m256i c) {
    return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, a), ones));
  });
}
Work bf16_chains(int64_t n) { return fp32_chains(n); }  // widened to fp32, the fastest this set can do
#else
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
Work fp32_chains(int64_t n) {
  const Float4 a = {0.999f, 0.999f, 0.999f, 0.999f}, b = {0.5f, 0.5f, 0.5f, 0.5f};
  return run_chains(n, 8, b, [&](Float4 c) { return c * a + b; });
}
Work int8_chains(int64_t n) {
  const Int4 a = {3, 5, 7, 9};
  return run_chains(n, 8, a, [&](Int4 c) { return c * a + a; });
}
Work bf16_chains(int64_t n) { return fp32_chains(n); }
#endif

#if defined(__AMX_TILE__)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Four accumulator tiles, as a matrix product of two by two tiles would keep.
template <bool integers>
Work tile_chains(int64_t n) {
  const TileConfig config;
  _tile_loadconfig(&config);
  alignas(64) uint16_t ones[16 * 32];
  for (uint16_t& x : ones) x = 0x0101;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (integers) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[256];
  _tile_stored(0, sums, 64);
  _tile_release();
  return {4.0 * 16 * 16 * (integers ? 64 : 32) * 2 * double(n), sums[0]};
}
Work best_bf16(int64_t n) { return tile_chains<false>(n); }
Work best_int8(int64_t n) { return tile_chains<true>(n); }
#else
Work best_bf16(int64_t n) { return bf16_chains(n); }
Work best_int8(int64_t n) { return int8_chains(n); }
#endif

}  // namespace

void limit_math(const LimitMathParams& p) {
  parallel_for(p.parts, [&](int64_t part) {
    const Work work = p.kind == MathKind::fp32   ? fp32_chains(p.iterations)
                      : p.kind == MathKind::bf16 ? best_bf16(p.iterations)
                                                 : best_int8(p.iterations);
    p.results[2 * part] = work.operations;
    p.results[2 * part + 1] = work.checksum;
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, limit_math, LimitMathParams)
