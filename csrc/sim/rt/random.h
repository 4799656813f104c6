// The scheduler's dice: small, fast, and the same on every machine.
#pragma once

#include <cstdint>

namespace tranche::sim {

class Random {
 public:
  void seed(uint64_t seed) {
    // splitmix64, so that neighbouring seeds give unrelated streams
    uint64_t z = seed + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    state_ = (z ^ (z >> 31)) | 1;
  }

  uint64_t next() {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1dull;
  }

  uint32_t below(uint32_t bound) { return uint32_t((next() >> 32) * bound >> 32); }

  // One of the set bits of a non-zero mask.
  uint32_t pick(uint32_t mask) {
    const uint32_t turn = uint32_t(next() >> 59);
    const uint32_t rotated = turn == 0 ? mask : (mask >> turn | mask << (32 - turn));
    return (uint32_t(__builtin_ctz(rotated)) + turn) & 31u;
  }

 private:
  uint64_t state_ = 1;
};

}  // namespace tranche::sim
