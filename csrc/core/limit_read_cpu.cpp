// Whole cache lines, four in flight; the compiler makes vectors of the eight words.
#include "core/isa.h"
#include "core/limit_read.h"
#include "core/parallel.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

constexpr int64_t kLineWords = 8;

uint64_t read_lines(const uint64_t* words, int64_t lines) {
  uint64_t sums[4 * kLineWords] = {};
  int64_t line = 0;
  for (; line + 4 <= lines; line += 4) {
    for (int64_t i = 0; i < 4 * kLineWords; ++i) sums[i] ^= words[line * kLineWords + i];
  }
  for (; line < lines; ++line) {
    for (int64_t i = 0; i < kLineWords; ++i) sums[i] ^= words[line * kLineWords + i];
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total ^= sum;
  return total;
}

}  // namespace

void limit_read(const LimitReadParams& p) {
  const int64_t lines = p.words / kLineWords;
  parallel_for(p.parts, [&](int64_t part) {
    const int64_t begin = lines * part / p.parts, end = lines * (part + 1) / p.parts;
    p.checksum[part] = read_lines(p.buffer + begin * kLineWords, end - begin);
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, limit_read, LimitReadParams)
