// Element types of our own, so that a kernel file needs neither torch nor the CUDA toolkit.
//
// A type holds bits and nothing else; arithmetic is done in float after to_float(). Conversions round to
// nearest, ties to even, keep infinities, and quiet NaNs. On the GPU the fast paths are in ptx.cuh; these
// portable forms are the meaning of both.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TRANCHE_HD __host__ __device__ __forceinline__
#else
// Always inlined: CPU kernels compile this file once per instruction set, and an out-of-line copy would be
// one weak symbol for all of them.
#define TRANCHE_HD inline __attribute__((always_inline))
#endif

namespace tranche {

struct alignas(2) bf16 {
  uint16_t bits;
};

struct alignas(2) half {
  uint16_t bits;
};

// OCP 8-bit float, 4 exponent and 3 mantissa bits, no infinities: 0x7f and 0xff are NaN, 448 is the largest.
struct e4m3 {
  uint8_t bits;
};

enum class DType : int32_t { f64, f32, f16, bf16, e4m3 };

template <class T>
struct dtype_of;
template <>
struct dtype_of<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct dtype_of<half> {
  static constexpr DType value = DType::f16;
};
template <>
struct dtype_of<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct dtype_of<e4m3> {
  static constexpr DType value = DType::e4m3;
};

// The type that sums of T are kept in.
template <class T>
struct compute_type {
  using type = float;
};
template <>
struct compute_type<double> {
  using type = double;
};

TRANCHE_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

TRANCHE_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

TRANCHE_HD float to_float(float x) { return x; }

TRANCHE_HD float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }

TRANCHE_HD float to_float(half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu, mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    return bits_float(float_bits(magnitude) | sign);
  }
  if (exponent == 31) {
    return bits_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x00400000u : 0u));
  }
  return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

TRANCHE_HD float to_float(e4m3 x) {
  const uint32_t sign = uint32_t(x.bits & 0x80u) << 24;
  const uint32_t exponent = (x.bits >> 3) & 0xfu, mantissa = x.bits & 7u;
  if ((x.bits & 0x7fu) == 0x7fu) return bits_float(sign | 0x7fc00000u);
  if (exponent == 0) return bits_float(float_bits(float(mantissa) * 0.001953125f) | sign);  // * 2^-9
  return bits_float(sign | ((exponent + 120u) << 23) | (mantissa << 20));
}

template <class T>
TRANCHE_HD T from_float(float x);

template <>
TRANCHE_HD float from_float<float>(float x) {
  return x;
}

template <>
TRANCHE_HD bf16 from_float<bf16>(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fff)};  // the canonical NaN of cvt.rn.bf16.f32
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <>
TRANCHE_HD half from_float<half>(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(0x7fff)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {                                    // subnormal: let the float adder round
    const float shifted = bits_float(magnitude) + 0.5f;             // one ulp of 0.5 is 2^-24
    return {uint16_t(sign | (float_bits(shifted) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

// Saturates at 448, as torch and cvt.rn.satfinite.e4m3x2.f32 do for caches; NaN stays NaN.
template <>
TRANCHE_HD e4m3 from_float<e4m3>(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 24) & 0x80u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint8_t(sign | 0x7fu)};
  if (magnitude >= 0x43e00000u) return {uint8_t(sign | 0x7eu)};
  if (magnitude < 0x3c800000u) {                             // below 2^-6: steps of 2^-9
    const float shifted = bits_float(magnitude) + 16384.0f;  // one ulp of 2^14 is 2^-9
    return {uint8_t(sign | (float_bits(shifted) - 0x46800000u))};
  }
  return {uint8_t(sign | ((magnitude - 0x3c000000u + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20))};
}

}  // namespace tranche
