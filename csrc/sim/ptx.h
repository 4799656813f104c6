// The host twins of core/ptx.cuh: the same names and signatures, plus the line of the call. Register arrays
// are handed over by value, so that a kernel's accumulators stay in registers and out of the instrumented
// traffic.
#pragma once

#include "core/numeric.h"
#include "sim/cuda.h"

namespace tranche::ptx {

using sim::Site;
using sim::WarpOp;

inline uint32_t shared_address(const void* pointer, Site site = Site::here()) {
  return tranche_sim_shared_offset(pointer, site);
}

// ---- named barriers

inline void named_barrier_sync(uint32_t id, uint32_t count, Site site = Site::here()) {
  tranche_sim_named_barrier(id, count, true, site);
}

inline void named_barrier_arrive(uint32_t id, uint32_t count, Site site = Site::here()) {
  tranche_sim_named_barrier(id, count, false, site);
}

// ---- asynchronous copies to shared memory -----------------------------------------------------------------

inline void cp_async_16(void* shared, const void* global, bool valid, Site site = Site::here()) {
  tranche_sim_copy_async(shared, global, 16, valid, site);
}

inline void cp_async_4(void* shared, const void* global, bool valid, Site site = Site::here()) {
  tranche_sim_copy_async(shared, global, 4, valid, site);
}

inline void cp_async_commit() { tranche_sim_copy_async_commit(); }

template <int pending>
inline void cp_async_wait() {
  static_assert(pending >= 0);
  tranche_sim_copy_async_wait(pending);
}

// ---- 8x8 matrices of 16-bit elements between shared memory and registers

namespace detail {

__forceinline__ void ldmatrix(uint32_t (&r)[4], WarpOp op, const void* row, Site site) {
  const sim::Word4Result words = tranche_sim_ldmatrix(op, 4, row, site);
  r[0] = uint32_t(words.low);
  r[1] = uint32_t(words.low >> 32);
  r[2] = uint32_t(words.high);
  r[3] = uint32_t(words.high >> 32);
}

__forceinline__ void ldmatrix(uint32_t (&r)[2], WarpOp op, const void* row, Site site) {
  const sim::Word4Result words = tranche_sim_ldmatrix(op, 2, row, site);
  r[0] = uint32_t(words.low);
  r[1] = uint32_t(words.low >> 32);
}

__forceinline__ uint64_t pair(uint32_t low, uint32_t high) { return uint64_t(high) << 32 | low; }

}  // namespace detail

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  detail::ldmatrix(r, WarpOp::ldmatrix, row, site);
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  detail::ldmatrix(r, WarpOp::ldmatrix_trans, row, site);
}
__forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row, Site site = Site::here()) {
  detail::ldmatrix(r, WarpOp::ldmatrix, row, site);
}
__forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, Site site = Site::here()) {
  detail::ldmatrix(r, WarpOp::ldmatrix_trans, row, site);
}

// ---- d = a * b + d, a row-major, b column-major, one warp

namespace detail {

__forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                         uint32_t b1, WarpOp op, Site site) {
  const sim::Float4Result r = tranche_sim_mma_f32(a0, a1, a2, a3, b0, b1, d[0], d[1], d[2], d[3], op, site);
  d[0] = r.x;
  d[1] = r.y;
  d[2] = r.z;
  d[3] = r.w;
}

__forceinline__ void mma(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                         uint32_t b1, WarpOp op, Site site) {
  const sim::Word4Result r =
      tranche_sim_mma_s32(pair(a0, a1), pair(a2, a3), pair(b0, b1), pair(uint32_t(d[0]), uint32_t(d[1])),
                          pair(uint32_t(d[2]), uint32_t(d[3])), op, site);
  d[0] = int32_t(r.low);
  d[1] = int32_t(r.low >> 32);
  d[2] = int32_t(r.high);
  d[3] = int32_t(r.high >> 32);
}

template <class T>
inline constexpr bool is_bf16 = std::is_same_v<T, bf16>;
template <class T>
inline constexpr bool is_signed_byte = std::is_same_v<T, int8_t>;

}  // namespace detail

template <class T>
__forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  Site site = Site::here()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, half>);
  detail::mma(d, a[0], a[1], a[2], a[3], b[0], b[1],
              detail::is_bf16<T> ? WarpOp::mma_m16n8k16_bf16 : WarpOp::mma_m16n8k16_f16, site);
}

template <class T>
__forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b,
                                 Site site = Site::here()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, half>);
  detail::mma(d, a[0], a[1], 0, 0, b, 0,
              detail::is_bf16<T> ? WarpOp::mma_m16n8k8_bf16 : WarpOp::mma_m16n8k8_f16, site);
}

template <class T>
__forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  Site site = Site::here()) {
  static_assert(std::is_same_v<T, int8_t> || std::is_same_v<T, uint8_t>);
  detail::mma(d, a[0], a[1], a[2], a[3], b[0], b[1],
              detail::is_signed_byte<T> ? WarpOp::mma_m16n8k32_s8 : WarpOp::mma_m16n8k32_u8, site);
}

template <class T>
__forceinline__ void mma_m16n8k16(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b,
                                  Site site = Site::here()) {
  static_assert(std::is_same_v<T, int8_t> || std::is_same_v<T, uint8_t>);
  detail::mma(d, a[0], a[1], 0, 0, b, 0,
              detail::is_signed_byte<T> ? WarpOp::mma_m16n8k16_s8 : WarpOp::mma_m16n8k16_u8, site);
}

// ---- conversions and arithmetic

template <class T>
inline uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, half>);
  return uint32_t(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

// A product rounded on its own, never contracted with what it is added to.
inline float mul(float a, float b) { return a * b; }

inline int opaque(int x) { return x; }

namespace detail {

// ".ftz": subnormals are zeros, on the way in and on the way out.
inline float flush(float x) {
  const uint32_t bits = float_bits(x);
  return (bits & 0x7f800000u) == 0 ? bits_float(bits & 0x80000000u) : x;
}

}  // namespace detail

inline float exp2_approx(float x) { return detail::flush(exp2f(detail::flush(x))); }

inline float log2_approx(float x) { return log2f(detail::flush(x)); }

inline float reciprocal_approx(float x) { return detail::flush(1.0f / detail::flush(x)); }

// ---- kernels that overlap on a stream

// Kernels run one after the other here; what is checked is that nothing is touched before the wait.
inline void grid_dependency_wait() { tranche_sim_grid_dependency_wait(); }
inline void grid_launch_dependents() {}

// ---- global memory

inline uint4 load_streaming_16(const void* global, Site site = Site::here()) {
  return tranche_sim_load_16(global, site);
}

}  // namespace tranche::ptx
