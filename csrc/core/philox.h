// Random bits from a counter: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011). A draw is a function of its key and its counter and of nothing else, so it is the
// same on every device, in every order, and whatever else was drawn.
#pragma once

#include <cstdint>

#include "core/numeric.h"

namespace tranche {

struct Philox {
  uint32_t words[4];
};

TRANCHE_HD Philox philox4x32(Philox counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * counter.words[0];
    const uint64_t product1 = uint64_t(0xCD9E8D57u) * counter.words[2];
    counter = {{uint32_t(product1 >> 32) ^ counter.words[1] ^ key0, uint32_t(product1),
                uint32_t(product0 >> 32) ^ counter.words[3] ^ key1, uint32_t(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// 64 random bits: those of the draw number `index` of the stream `seed`.
TRANCHE_HD uint64_t random_bits(uint64_t seed, uint64_t index) {
  const Philox counter = {{uint32_t(index), uint32_t(index >> 32), 0, 0}};
  const Philox draw = philox4x32(counter, uint32_t(seed), uint32_t(seed >> 32));
  return uint64_t(draw.words[1]) << 32 | draw.words[0];
}

// The upper half of the 128-bit product: scales 64 random bits to an integer in [0, range).
TRANCHE_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
  const uint64_t a0 = uint32_t(a), a1 = a >> 32, b0 = uint32_t(b), b1 = b >> 32;
  const uint64_t low = a0 * b0, middle = a1 * b0 + (low >> 32), other = a0 * b1 + uint32_t(middle);
  return a1 * b1 + (middle >> 32) + (other >> 32);
}

}  // namespace tranche
