// CUDA's integer and floating-point intrinsics. Those that the hardware approximates are computed to full
// precision here; a test that compares bits across backends must not use them.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "sim/runtime.h"
#include "sim/synchronization.h"

// ---- bits -------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)(x)); }

inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= ((x >> i) & 1u) << (31 - i);
  return reversed;
}

// Four bytes chosen out of eight; bit 3 of a selector replicates the sign of the chosen byte.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = (selector >> (4 * i)) & 0xfu;
    unsigned byte = unsigned(bytes >> (8 * (s & 7u))) & 0xffu;
    if (s & 8u) byte = (byte & 0x80u) ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32 | low) << (shift & 31u)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31u));
}
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
inline int __mulhi(int x, int y) { return int(int64_t(x) * y >> 32); }

inline int __dp4a(int a, int b, int c) {
  uint32_t sum = uint32_t(c);
  for (int i = 0; i < 4; ++i)
    sum += uint32_t(int(int8_t(unsigned(a) >> 8 * i)) * int(int8_t(unsigned(b) >> 8 * i)));
  return int(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 0xffu) * (b >> 8 * i & 0xffu);
  return c;
}

inline unsigned __float_as_uint(float x) {
  return tranche::sim::from_bits<unsigned>(tranche::sim::to_bits(x));
}
inline int __float_as_int(float x) { return tranche::sim::from_bits<int>(tranche::sim::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return tranche::sim::from_bits<float>(tranche::sim::to_bits(x)); }
inline float __int_as_float(int x) { return tranche::sim::from_bits<float>(tranche::sim::to_bits(x)); }
inline long long __double_as_longlong(double x) {
  return tranche::sim::from_bits<long long>(tranche::sim::to_bits(x));
}
inline double __longlong_as_double(long long x) {
  return tranche::sim::from_bits<double>(tranche::sim::to_bits(x));
}

// ---- arithmetic -------------------------------------------------------------------------------------------

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }  // NaN gives 0
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// Conversions to int saturate and take NaN to 0, as the hardware does and C++ does not.
namespace tranche::sim {
inline int saturate_to_int(float rounded) {
  if (isnan(rounded)) return 0;
  if (rounded >= 2147483648.0f) return 2147483647;
  if (rounded < -2147483648.0f) return -2147483647 - 1;
  return int(rounded);
}
}  // namespace tranche::sim
inline int __float2int_rn(float x) { return tranche::sim::saturate_to_int(nearbyintf(x)); }
inline int __float2int_rz(float x) { return tranche::sim::saturate_to_int(truncf(x)); }
inline int __float2int_rd(float x) { return tranche::sim::saturate_to_int(floorf(x)); }
inline int __float2int_ru(float x) { return tranche::sim::saturate_to_int(ceilf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }

// CUDA's min and max take any two arithmetic types; on floats they prefer the number to the NaN.
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::is_same_v<T, float> ? T(fminf(float(a), float(b))) : T(fmin(double(a), double(b)));
  } else {
    return T(a) < T(b) ? T(a) : T(b);
  }
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::is_same_v<T, float> ? T(fmaxf(float(a), float(b))) : T(fmax(double(a), double(b)));
  } else {
    return T(a) > T(b) ? T(a) : T(b);
  }
}

// ---- memory and time --------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}

inline long long clock64() { return tranche_sim_clock(); }
inline void __trap(tranche::sim::Site site = tranche::sim::Site::here()) { tranche_sim_trap("__trap", site); }
