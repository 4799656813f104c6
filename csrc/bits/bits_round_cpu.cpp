// A loop that compilers vectorise.
#include "bits/bits_round.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace tranche::cpu::TRANCHE_ISA {

void bits_round(const BitsRoundParams& p) {
  constexpr int64_t kChunk = 1 << 16;
  const int bits = p.bits;
  parallel_for((p.count + kChunk - 1) / kChunk, [&p, bits](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = begin + kChunk < p.count ? begin + kChunk : p.count;
    // Half a step, and the step as shifts; 8 bits are a shift by zero.
    const int half = bits == 8 ? 0 : 1 << (7 - bits), shift = 8 - bits, top = (1 << (bits - 1)) - 1;
    for (int64_t i = begin; i < end; ++i) {
      const int rounded = (p.codes[i] + half) >> shift;
      p.out[i] = int8_t(rounded < top ? rounded : top);
    }
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, bits_round, BitsRoundParams)
