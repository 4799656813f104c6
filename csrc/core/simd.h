// A vector of floats per instruction set, for CPU kernels: 16 lanes on AVX-512, 8 on AVX2, 4 elsewhere.
//
// Everything is `static` and lives in the instruction set's namespace (see isa.h). The rules that kernels
// rely on: vmax(x, y) is y when either is NaN; vexp2(0) == 1 exactly and vexp2 keeps NaN; no function's lanes
// depend on one another. vfma rounds once where the hardware can and twice on baseline.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/numeric.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// GCC 12 warns of its own _mm512_undefined_ps().
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#ifndef TRANCHE_ISA
#error "compile CPU kernels with -DTRANCHE_ISA=baseline, avx2, avx512 or amx"
#endif

#define TRANCHE_INLINE static inline __attribute__((always_inline))

namespace tranche::cpu::TRANCHE_ISA {

constexpr float kInf = __builtin_inff();

// Emits nothing, and the compiler cannot look through it: GCC would otherwise carry a loop's accumulators in
// two sets of registers and copy between them.
template <class V>
TRANCHE_INLINE void keep_in_register(V& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#else
  (void)value;
#endif
}

#if defined(__AVX512F__)

constexpr int kWidth = 16;
using Vec = __m512;
using Mask = __mmask16;

TRANCHE_INLINE Vec vset(float x) { return _mm512_set1_ps(x); }
TRANCHE_INLINE Vec vload(const float* p) { return _mm512_loadu_ps(p); }
TRANCHE_INLINE void vstore(float* p, Vec x) { _mm512_storeu_ps(p, x); }
TRANCHE_INLINE Vec vadd(Vec x, Vec y) { return _mm512_add_ps(x, y); }
TRANCHE_INLINE Vec vsub(Vec x, Vec y) { return _mm512_sub_ps(x, y); }
TRANCHE_INLINE Vec vmul(Vec x, Vec y) { return _mm512_mul_ps(x, y); }
TRANCHE_INLINE Vec vdiv(Vec x, Vec y) { return _mm512_div_ps(x, y); }
TRANCHE_INLINE Vec vfma(Vec x, Vec y, Vec z) { return _mm512_fmadd_ps(x, y, z); }
TRANCHE_INLINE Vec vfms(Vec x, Vec y, Vec z) { return _mm512_fmsub_ps(x, y, z); }
TRANCHE_INLINE Vec vmax(Vec x, Vec y) { return _mm512_max_ps(x, y); }
TRANCHE_INLINE Vec vabs(Vec x) { return _mm512_abs_ps(x); }
TRANCHE_INLINE Mask vlt(Vec x, Vec y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
TRANCHE_INLINE Mask veq(Vec x, Vec y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }
TRANCHE_INLINE Vec vselect(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no, yes); }
TRANCHE_INLINE bool vall(Mask m) { return m == 0xffff; }
TRANCHE_INLINE bool vany(Mask m) { return m != 0; }
TRANCHE_INLINE Mask mask_of_bits(uint32_t bits) { return Mask(bits); }
// Lanes with limit[lane] < x.
TRANCHE_INLINE Mask mask_above(int32_t x, const int32_t* limit) {
  return _mm512_cmp_epi32_mask(_mm512_loadu_si512(limit), _mm512_set1_epi32(x), _MM_CMPINT_LT);
}
TRANCHE_INLINE Mask mask_positive(Vec x) { return Mask(~_mm512_movepi32_mask(_mm512_castps_si512(x))); }

#elif defined(__AVX2__)

constexpr int kWidth = 8;
using Vec = __m256;
using Mask = __m256;

TRANCHE_INLINE Vec vset(float x) { return _mm256_set1_ps(x); }
TRANCHE_INLINE Vec vload(const float* p) { return _mm256_loadu_ps(p); }
TRANCHE_INLINE void vstore(float* p, Vec x) { _mm256_storeu_ps(p, x); }
TRANCHE_INLINE Vec vadd(Vec x, Vec y) { return _mm256_add_ps(x, y); }
TRANCHE_INLINE Vec vsub(Vec x, Vec y) { return _mm256_sub_ps(x, y); }
TRANCHE_INLINE Vec vmul(Vec x, Vec y) { return _mm256_mul_ps(x, y); }
TRANCHE_INLINE Vec vdiv(Vec x, Vec y) { return _mm256_div_ps(x, y); }
TRANCHE_INLINE Vec vfma(Vec x, Vec y, Vec z) { return _mm256_fmadd_ps(x, y, z); }
TRANCHE_INLINE Vec vfms(Vec x, Vec y, Vec z) { return _mm256_fmsub_ps(x, y, z); }
TRANCHE_INLINE Vec vmax(Vec x, Vec y) { return _mm256_max_ps(x, y); }
TRANCHE_INLINE Vec vabs(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
TRANCHE_INLINE Mask vlt(Vec x, Vec y) { return _mm256_cmp_ps(x, y, _CMP_LT_OQ); }
TRANCHE_INLINE Mask veq(Vec x, Vec y) { return _mm256_cmp_ps(x, y, _CMP_EQ_OQ); }
TRANCHE_INLINE Vec vselect(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, m); }
TRANCHE_INLINE bool vall(Mask m) { return _mm256_movemask_ps(m) == 0xff; }
TRANCHE_INLINE bool vany(Mask m) { return _mm256_movemask_ps(m) != 0; }
TRANCHE_INLINE Mask mask_of_bits(uint32_t bits) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(int(bits)), lanes);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lanes));
}
TRANCHE_INLINE Mask mask_above(int32_t x, const int32_t* limit) {
  const __m256i limits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(limit));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(x), limits));
}
TRANCHE_INLINE Mask mask_positive(Vec x) {
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(-1)));
}

#else

constexpr int kWidth = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));

TRANCHE_INLINE Vec vset(float x) { return Vec{x, x, x, x}; }
TRANCHE_INLINE Vec vload(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
TRANCHE_INLINE void vstore(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }
TRANCHE_INLINE Vec vadd(Vec x, Vec y) { return x + y; }
TRANCHE_INLINE Vec vsub(Vec x, Vec y) { return x - y; }
TRANCHE_INLINE Vec vmul(Vec x, Vec y) { return x * y; }
TRANCHE_INLINE Vec vdiv(Vec x, Vec y) { return x / y; }
TRANCHE_INLINE Vec vfma(Vec x, Vec y, Vec z) { return x * y + z; }
TRANCHE_INLINE Vec vfms(Vec x, Vec y, Vec z) { return x * y - z; }
TRANCHE_INLINE Vec vselect(Mask m, Vec yes, Vec no) { return Vec((Mask(yes) & m) | (Mask(no) & ~m)); }
TRANCHE_INLINE Mask vlt(Vec x, Vec y) { return x < y; }
TRANCHE_INLINE Mask veq(Vec x, Vec y) { return x == y; }
TRANCHE_INLINE Vec vmax(Vec x, Vec y) { return vselect(x > y, x, y); }
TRANCHE_INLINE Vec vabs(Vec x) { return Vec(Mask(x) & Mask{0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff}); }
TRANCHE_INLINE bool vall(Mask m) { return (m[0] & m[1] & m[2] & m[3]) != 0; }
TRANCHE_INLINE bool vany(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
TRANCHE_INLINE Mask mask_of_bits(uint32_t bits) {
  const Mask lanes = {1, 2, 4, 8};
  const int32_t b = int32_t(bits);
  return (Mask{b, b, b, b} & lanes) == lanes;
}
TRANCHE_INLINE Mask mask_above(int32_t x, const int32_t* limit) {
  Mask limits;
  __builtin_memcpy(&limits, limit, sizeof limits);
  return Mask{x, x, x, x} > limits;
}
TRANCHE_INLINE Mask mask_positive(Vec x) { return Mask(x) > Mask{-1, -1, -1, -1}; }

#endif

// 2^f on [-1/2, 1/2] with 2^0 == 1, minimax in relative error: 2.8e-6 for degree 4, 9e-8 for 5, 2e-9 (so: one
// rounding) for 6.
template <int kDegree>
TRANCHE_INLINE Vec exp2_polynomial(Vec f) {
  static_assert(4 <= kDegree && kDegree <= 6);
  Vec p;
  if constexpr (kDegree == 4) {
    p = vset(0.009582852944731712f);
    p = vfma(p, f, vset(0.055906426161527634f));
    p = vfma(p, f, vset(0.24024099111557007f));
    p = vfma(p, f, vset(0.6931241750717163f));
  } else if constexpr (kDegree == 5) {
    p = vset(0.0013264745939522982f);
    p = vfma(p, f, vset(0.009671512059867382f));
    p = vfma(p, f, vset(0.05550733581185341f));
    p = vfma(p, f, vset(0.24022242426872253f));
    p = vfma(p, f, vset(0.6931470036506653f));
  } else {
    p = vset(0.00015353361959569156f);
    p = vfma(p, f, vset(0.0013398873852565885f));
    p = vfma(p, f, vset(0.00961843691766262f));
    p = vfma(p, f, vset(0.055503323674201965f));
    p = vfma(p, f, vset(0.24022647738456726f));
    p = vfma(p, f, vset(0.6931471824645996f));
  }
  return vfma(p, f, vset(1.0f));
}

// 2^x for x <= 127: 0 below -126 (no subnormals, so no assists), NaN for NaN.
template <int kDegree>
TRANCHE_INLINE Vec vexp2(Vec x) {
#if defined(__AVX512F__)
  const Mask live = _mm512_cmp_ps_mask(x, vset(-126.0f), _CMP_NLT_UQ);
  const __m512i n = _mm512_cvtps_epi32(x);  // 0x80000000 for NaN: the shift below then adds nothing
  const Vec p = exp2_polynomial<kDegree>(vsub(x, _mm512_cvtepi32_ps(n)));
  const __m512i scaled = _mm512_maskz_add_epi32(live, _mm512_castps_si512(p), _mm512_slli_epi32(n, 23));
  return _mm512_castsi512_ps(scaled);
#elif defined(__AVX2__)
  const Mask live = _mm256_cmp_ps(x, vset(-126.0f), _CMP_NLT_UQ);
  const __m256i n = _mm256_cvtps_epi32(x);
  const Vec p = exp2_polynomial<kDegree>(vsub(x, _mm256_cvtepi32_ps(n)));
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(n, 23));
  return _mm256_and_ps(live, _mm256_castsi256_ps(scaled));
#else
  const Vec magic = vset(12582912.0f);  // 1.5 * 2^23: rounds to an integer in its low bits
  const Vec shifted = x + magic;
  const Vec p = exp2_polynomial<kDegree>(x - (shifted - magic));
  const Vec scaled = Vec(Mask(p) + (Mask(shifted) << 23));
  return vselect(x != x, x, vselect(x < vset(-126.0f), vset(0.0f), scaled));
#endif
}

// tanh to about 2 ulp: an odd polynomial near 0 (where 1 - 2 / (e^2x + 1) would cancel), that quotient
// elsewhere.
TRANCHE_INLINE Vec vtanh(Vec x) {
  const Vec magnitude = vabs(x), square = vmul(x, x);
  Vec p = vset(-5.70498872745e-3f);
  p = vfma(p, square, vset(2.06390887954e-2f));
  p = vfma(p, square, vset(-5.37397155531e-2f));
  p = vfma(p, square, vset(1.33314422036e-1f));
  p = vfma(p, square, vset(-3.33332819422e-1f));
  const Vec near = vfma(vmul(p, square), x, x);
  // Beyond 10 tanh is 1 in float. The clamp is written so that NaN passes.
  const Vec clamped = vselect(vlt(vset(10.0f), magnitude), vset(10.0f), magnitude);
  const Vec e = vexp2<6>(vmul(clamped, vset(2.885390081777927f)));
  const Vec far = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(e, vset(1.0f))));
  const Vec signed_far = vselect(vlt(x, vset(0.0f)), vsub(vset(0.0f), far), far);
  return vselect(vlt(magnitude, vset(0.625f)), near, signed_far);
}

#if defined(__AVX512F__)

// a[i][j] becomes a[j][i], for 16 vectors of 16 32-bit lanes.
TRANCHE_INLINE void transpose16(__m512i (&a)[16]) {
  __m512i b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    const __m512i t0 = _mm512_unpacklo_epi32(a[i], a[i + 1]), t1 = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    const __m512i t2 = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]),
                  t3 = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
    b[i] = _mm512_unpacklo_epi64(t0, t2);
    b[i + 1] = _mm512_unpackhi_epi64(t0, t2);
    b[i + 2] = _mm512_unpacklo_epi64(t1, t3);
    b[i + 3] = _mm512_unpackhi_epi64(t1, t3);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i t0 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88),
                  t1 = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i t2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i t3 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    a[i] = _mm512_shuffle_i32x4(t0, t2, 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(t1, t3, 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(t0, t2, 0xdd);
    a[i + 12] = _mm512_shuffle_i32x4(t1, t3, 0xdd);
  }
}

// 16 elements as float; of them the first `n` are read and the rest are 0.
TRANCHE_INLINE Vec load16(const float* p, int n) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1u), p);
}
TRANCHE_INLINE Vec load16(const bf16* p, int n) {
  const __m256i x = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1u), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
TRANCHE_INLINE Vec load16(const half* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1u), p));
}
TRANCHE_INLINE Vec load16(const e4m3* p, int n) {
  const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16((1u << n) - 1u), p);
  const __m256i x = _mm256_cvtepu8_epi16(bytes);
  const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  // As half the exponent reads 8 too low; the hardware's conversion is exact for subnormals as well.
  const __m256i as_half = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign);
  const Vec value = _mm512_mul_ps(_mm512_cvtph_ps(as_half), vset(256.0f));
  return _mm512_mask_mov_ps(value, nan, vset(__builtin_nanf("")));
}

TRANCHE_INLINE void store16(float* p, Vec x, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1u), x);
}
TRANCHE_INLINE void store16(bf16* p, Vec x, int n) {
  const __m256i packed = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1u), packed);
}
TRANCHE_INLINE void store16(half* p, Vec x, int n) {
  const __m256i packed = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1u), packed);
}

#endif  // __AVX512F__

// n elements to float.
template <class T>
TRANCHE_INLINE void row_to_float(const T* from, float* to, int n) {
#if defined(__AVX512F__)
  int i = 0;
  // Without a mask: what a masked store wrote can be loaded only once it has reached the cache.
  for (; i + 16 <= n; i += 16) vstore(to + i, load16(from + i, 16));
  if (i < n) store16(to + i, load16(from + i, n - i), n - i);
#elif defined(__AVX2__)
  int i = 0;
  if constexpr (sizeof(T) == 2 && !__is_same(T, bf16)) {
    for (; i + 8 <= n; i += 8) {
      vstore(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
  for (; i < n; ++i) to[i] = to_float(from[i]);
#else
  for (int i = 0; i < n; ++i) to[i] = to_float(from[i]);
#endif
}

}  // namespace tranche::cpu::TRANCHE_ISA
