// Two passes over a row: sums of squares in 64 lanes, added up in the order of the lanes, then the products.
#include "core/row_rms_norm.h"

#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {
namespace {

constexpr int kBlock = 64;

template <class T>
TRANCHE_INLINE float sum_of_squares(const T* x, int64_t width) {
  float block[kBlock], sums[kBlock] = {};
  for (int64_t i = 0; i < width; i += kBlock) {
    const int n = width - i < kBlock ? int(width - i) : kBlock;
    row_to_float(x + i, block, n);
    for (int j = n; j < kBlock; ++j) block[j] = 0.0f;
    for (int j = 0; j < kBlock; j += kWidth) {
      const Vec v = vload(block + j);
      vstore(sums + j, vadd(vload(sums + j), vmul(v, v)));
    }
  }
  float sum = 0.0f;
  for (float lane : sums) sum += lane;
  return sum;
}

template <class T>
void norm_row(const RowRmsNormParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row * p.width;
  const float mean = sum_of_squares(x, p.width) / float(p.width);
  const float scale = 1.0f / __builtin_sqrtf(mean + p.epsilon);
  float block[kBlock], factor[kBlock];
  for (int64_t i = 0; i < p.width; i += kBlock) {
    const int n = p.width - i < kBlock ? int(p.width - i) : kBlock;
    row_to_float(x + i, block, n);
    row_to_float(weight + i, factor, n);
    for (int j = 0; j < n; ++j) {
      out[i + j] = from_float<T>(factor[j] * to_float(from_float<T>(block[j] * scale)));
    }
  }
}

template <class T>
void norm(const RowRmsNormParams& p) {
  const bool worth_threads = p.rows * p.width >= 32768;  // a few microseconds of one thread
  if (worth_threads) {
    parallel_for(p.rows, [&p](int64_t row) { norm_row<T>(p, row); });
  } else {
    for (int64_t row = 0; row < p.rows; ++row) norm_row<T>(p, row);
  }
}

}  // namespace

void row_rms_norm(const RowRmsNormParams& p) {
  with_type<float, half, bf16>("row_rms_norm", p.type, [&](auto t) { norm<decltype(t)>(p); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, row_rms_norm, RowRmsNormParams)
