// Barriers, shuffles, votes, matches and reductions. Each takes the line of its call, which is both what a
// finding names and part of what lanes must agree on.
#pragma once

#include <cstring>
#include <type_traits>

#include "sim/runtime.h"

namespace tranche::sim {

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(WarpOp op, unsigned mask, T value, unsigned argument, int width, Site site) {
  return from_bits<T>(tranche_sim_warp(op, mask, to_bits(value), argument, unsigned(width), site));
}

}  // namespace tranche::sim

inline void __syncthreads(tranche::sim::Site site = tranche::sim::Site::here()) {
  tranche_sim_block_barrier(tranche::sim::BlockOp::sync, 0, site);
}
inline int __syncthreads_count(int predicate, tranche::sim::Site site = tranche::sim::Site::here()) {
  return int(tranche_sim_block_barrier(tranche::sim::BlockOp::count, predicate != 0, site));
}
inline int __syncthreads_and(int predicate, tranche::sim::Site site = tranche::sim::Site::here()) {
  return int(tranche_sim_block_barrier(tranche::sim::BlockOp::all, predicate != 0, site));
}
inline int __syncthreads_or(int predicate, tranche::sim::Site site = tranche::sim::Site::here()) {
  return int(tranche_sim_block_barrier(tranche::sim::BlockOp::any, predicate != 0, site));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, tranche::sim::Site site = tranche::sim::Site::here()) {
  tranche_sim_warp(tranche::sim::WarpOp::sync, mask, 0, 0, 32, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              tranche::sim::Site site = tranche::sim::Site::here()) {
  return tranche::sim::shuffle(tranche::sim::WarpOp::shuffle, mask, value, unsigned(lane), width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 tranche::sim::Site site = tranche::sim::Site::here()) {
  return tranche::sim::shuffle(tranche::sim::WarpOp::shuffle_up, mask, value, delta, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   tranche::sim::Site site = tranche::sim::Site::here()) {
  return tranche::sim::shuffle(tranche::sim::WarpOp::shuffle_down, mask, value, delta, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  tranche::sim::Site site = tranche::sim::Site::here()) {
  return tranche::sim::shuffle(tranche::sim::WarpOp::shuffle_xor, mask, value, unsigned(lanes), width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              tranche::sim::Site site = tranche::sim::Site::here()) {
  return unsigned(tranche_sim_warp(tranche::sim::WarpOp::ballot, mask, predicate != 0, 0, 32, site));
}
inline int __all_sync(unsigned mask, int predicate, tranche::sim::Site site = tranche::sim::Site::here()) {
  return int(tranche_sim_warp(tranche::sim::WarpOp::all, mask, predicate != 0, 0, 32, site));
}
inline int __any_sync(unsigned mask, int predicate, tranche::sim::Site site = tranche::sim::Site::here()) {
  return int(tranche_sim_warp(tranche::sim::WarpOp::any, mask, predicate != 0, 0, 32, site));
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, tranche::sim::Site site = tranche::sim::Site::here()) {
  return unsigned(
      tranche_sim_warp(tranche::sim::WarpOp::match_any, mask, tranche::sim::to_bits(value), 0, 32, site));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* agreed,
                          tranche::sim::Site site = tranche::sim::Site::here()) {
  const auto lanes = unsigned(
      tranche_sim_warp(tranche::sim::WarpOp::match_all, mask, tranche::sim::to_bits(value), 0, 32, site));
  *agreed = lanes != 0;
  return lanes;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value,
                                  tranche::sim::Site site = tranche::sim::Site::here()) {
  return unsigned(tranche_sim_warp(tranche::sim::WarpOp::reduce_add, mask, value, 0, 32, site));
}
inline int __reduce_add_sync(unsigned mask, int value, tranche::sim::Site site = tranche::sim::Site::here()) {
  return int(tranche_sim_warp(tranche::sim::WarpOp::reduce_add, mask, unsigned(value), 0, 32, site));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value,
                                  tranche::sim::Site site = tranche::sim::Site::here()) {
  return unsigned(tranche_sim_warp(tranche::sim::WarpOp::reduce_min_u32, mask, value, 0, 32, site));
}
inline int __reduce_min_sync(unsigned mask, int value, tranche::sim::Site site = tranche::sim::Site::here()) {
  return int(tranche_sim_warp(tranche::sim::WarpOp::reduce_min_s32, mask, unsigned(value), 0, 32, site));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value,
                                  tranche::sim::Site site = tranche::sim::Site::here()) {
  return unsigned(tranche_sim_warp(tranche::sim::WarpOp::reduce_max_u32, mask, value, 0, 32, site));
}
inline int __reduce_max_sync(unsigned mask, int value, tranche::sim::Site site = tranche::sim::Site::here()) {
  return int(tranche_sim_warp(tranche::sim::WarpOp::reduce_max_s32, mask, unsigned(value), 0, 32, site));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value,
                                  tranche::sim::Site site = tranche::sim::Site::here()) {
  return unsigned(tranche_sim_warp(tranche::sim::WarpOp::reduce_and, mask, value, 0, 32, site));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value,
                                 tranche::sim::Site site = tranche::sim::Site::here()) {
  return unsigned(tranche_sim_warp(tranche::sim::WarpOp::reduce_or, mask, value, 0, 32, site));
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value,
                                  tranche::sim::Site site = tranche::sim::Site::here()) {
  return unsigned(tranche_sim_warp(tranche::sim::WarpOp::reduce_xor, mask, value, 0, 32, site));
}

// The lanes that have not exited: the widest answer the hardware may give.
inline unsigned __activemask() { return tranche_sim_live_lanes(); }

inline void __threadfence() { tranche_sim_fence(); }
inline void __threadfence_system() { tranche_sim_fence(); }
// Orders a thread's own accesses, which one fiber's always are.
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { tranche_sim_pause(); }
