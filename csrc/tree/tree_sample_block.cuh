// What the threads of a block find out together: sums, maxima, and where a cumulative sum reaches a limit.
#pragma once

#include "core/launch.cuh"
#include "core/numeric.h"

namespace tranche {

constexpr int kSampleThreads = 256;
constexpr int kSampleWarps = kSampleThreads / 32;
constexpr int kLowBits = 20;  // of a weight, which shared memory adds up apart from the others

// Where a cumulative sum reaches a limit: the index, and the sum before it.
struct SampleCrossing {
  int index;
  uint64_t before;
};

// Every method is called by all threads of the block, and returns the same to all.
struct SampleBlock {
  int thread = int(threadIdx.x);

  __device__ uint64_t sum(uint64_t value) const {
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return over_warps(value, [](uint64_t a, uint64_t b) { return a + b; });
  }

  __device__ uint64_t max(uint64_t value) const {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const uint64_t other = __shfl_xor_sync(0xffffffffu, value, lanes);
      value = other > value ? other : value;
    }
    return over_warps(value, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  }

  // The first index of [0, count) up to and with which the sum of measure(index) reaches limit, for
  // 1 <= limit <= the whole sum. Each thread looks at a stretch of neighbours.
  template <class Measure>
  __device__ SampleCrossing crossing(int count, uint64_t limit, const Measure& measure) const {
    SHARED(uint64_t, warp_sums, kSampleWarps);
    SHARED(uint64_t, found_before, 1);
    SHARED(int, found_index, 1);
    const int stretch = (count + kSampleThreads - 1) / kSampleThreads;
    const int begin = thread * stretch < count ? thread * stretch : count;
    const int end = begin + stretch < count ? begin + stretch : count;
    uint64_t own = 0;
    for (int i = begin; i < end; ++i) own += measure(i);

    uint64_t through = own;  // the sum of this and all lower lanes, then of all lower threads
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const uint64_t lower = __shfl_up_sync(0xffffffffu, through, lanes);
      if (thread % 32 >= lanes) through += lower;
    }
    if (thread % 32 == 31) warp_sums[thread / 32] = through;
    if (thread == 0) {
      found_index[0] = 0;
      found_before[0] = 0;
    }
    __syncthreads();
    for (int warp = 0; warp < thread / 32; ++warp) through += warp_sums[warp];
    uint64_t before = through - own;
    if (before < limit && limit <= through) {
      int i = begin;
      for (uint64_t here = measure(i); before + here < limit; here = measure(++i)) before += here;
      found_index[0] = i;
      found_before[0] = before;
    }
    __syncthreads();
    const SampleCrossing found = {found_index[0], found_before[0]};
    __syncthreads();  // before the next call writes
    return found;
  }

 private:
  template <class Combine>
  __device__ uint64_t over_warps(uint64_t value, const Combine& combine) const {
    SHARED(uint64_t, values, kSampleWarps);
    if (thread % 32 == 0) values[thread / 32] = value;
    __syncthreads();
    uint64_t result = values[0];
    for (int warp = 1; warp < kSampleWarps; ++warp) result = combine(result, values[warp]);
    __syncthreads();  // before the next call writes
    return result;
  }
};

}  // namespace tranche
