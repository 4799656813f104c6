// What the CPU kernels find in a row of logits, whatever they do with it.
#pragma once

#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int kRowBlock = 1024;  // tokens
static_assert(kRowBlock % kWidth == 0);

// The largest logit, NaN as -inf.
template <class T>
static float largest(const T* row, int64_t vocab) {
  alignas(64) float x[kRowBlock];
  Vec best[4] = {vset(-kInf), vset(-kInf), vset(-kInf), vset(-kInf)};
  for (int64_t first = 0; first < vocab; first += kRowBlock) {
    const int count = int(vocab - first < kRowBlock ? vocab - first : kRowBlock);
    const float* source = x;
    if constexpr (__is_same(T, float)) {
      source = row + first;
    } else {
      row_to_float(row + first, x, count);
    }
    int i = 0;
    for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
      for (int j = 0; j < 4; ++j) best[j] = vmax(vload(source + i + j * kWidth), best[j]);
    }
    for (; i < count; ++i) best[0] = vmax(vset(source[i]), best[0]);
  }
  alignas(64) float lanes[kWidth];
  vstore(lanes, vmax(vmax(best[0], best[1]), vmax(best[2], best[3])));
  float result = lanes[0];
  for (float lane : lanes) result = lane > result ? lane : result;
  return result;
}

// The first token whose logit is the largest; 0 where all are NaN or -inf.
template <class T>
static int64_t first_largest(const T* row, int64_t vocab, float max) {
  alignas(64) float x[kRowBlock];
  for (int64_t first = 0; first < vocab && max > -kInf; first += kRowBlock) {
    const int count = int(vocab - first < kRowBlock ? vocab - first : kRowBlock);
    row_to_float(row + first, x, count);
    int found = 0;
    for (int i = 0; i < count; ++i) found |= int(x[i] == max);
    for (int i = 0; i < count && found; ++i) {
      if (x[i] == max) return first + i;
    }
  }
  return 0;
}

}  // namespace tranche::cpu::TRANCHE_ISA
