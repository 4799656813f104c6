// Blocks of a row, the last one padded: an element meets the same instructions wherever it stands.
#include "core/activation_cpu.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/row_silu_mul.h"
#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {
namespace {

constexpr int kBlock = 64;

template <class T>
TRANCHE_INLINE void silu_mul_block(const T* gate, const T* up, T* out, int n) {
  float x[kBlock] = {}, y[kBlock] = {};
  row_to_float(gate, x, n);
  row_to_float(up, y, n);
  for (int i = 0; i < kBlock; i += kWidth) vstore(y + i, vmul(vsilu(vload(x + i)), vload(y + i)));
  for (int i = 0; i < n; ++i) out[i] = from_float<T>(y[i]);
}

template <class T>
void silu_mul(const RowSiluMulParams& p) {
  // Tasks are parts of rows, so that one wide row feeds all threads.
  constexpr int64_t kPart = 4096;
  const int64_t parts = (p.width + kPart - 1) / kPart;
  const auto part_of_row = [&](int64_t task) {
    const int64_t row = task / parts, first = task % parts * kPart;
    const int64_t end = first + kPart < p.width ? first + kPart : p.width;
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
    T* out = static_cast<T*>(p.out) + row * p.width;
    for (int64_t i = first; i < end; i += kBlock) {
      silu_mul_block(gate + i, up + i, out + i, end - i < kBlock ? int(end - i) : kBlock);
    }
  };
  const bool worth_threads = p.rows * p.width >= 32768;  // a few microseconds of one thread
  if (worth_threads) {
    parallel_for(p.rows * parts, part_of_row);
  } else {
    for (int64_t task = 0; task < p.rows * parts; ++task) part_of_row(task);
  }
}

}  // namespace

void row_silu_mul(const RowSiluMulParams& p) {
  with_type<float, half, bf16>("row_silu_mul", p.type, [&](auto t) { silu_mul<decltype(t)>(p); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, row_silu_mul, RowSiluMulParams)
