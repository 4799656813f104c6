// Two passes over a row: the largest magnitude, then codes and their sums. A magnitude is compared as an
// integer, which orders floats, puts NaN above infinity, and gives the same maximum in any order.
#include "bits/bits_quantize_activations.h"

#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

constexpr int kBlock = 64;
constexpr uint32_t kInfinity = 0x7f800000u;

template <class T>
TRANCHE_INLINE uint32_t largest_magnitude(const T* x, int64_t inputs) {
  uint32_t largest[kBlock] = {};
  float block[kBlock] = {};
  for (int64_t i = 0; i < inputs; i += kBlock) {
    const int n = inputs - i < kBlock ? int(inputs - i) : kBlock;
    row_to_float(x + i, block, n);
    for (int j = 0; j < kBlock; ++j) {  // of a short block, the rest is the block before
      const uint32_t magnitude = float_bits(block[j]) & 0x7fffffffu;
      largest[j] = largest[j] < magnitude ? magnitude : largest[j];
    }
  }
  uint32_t all = 0;
  for (uint32_t one : largest) all = all < one ? one : all;
  return all;
}

// Codes of up to 64 floats, the rest zeros, and their sum. Adding and subtracting 1.5 * 2^23 rounds half to
// even; the clamp comes first, since the product is at most a rounding beyond 127.
TRANCHE_INLINE int32_t quantize_block(const float* x, float inverse, int n, int8_t* codes) {
  constexpr float kMagic = 12582912.0f;
  int32_t sum = 0;
  int8_t block[kBlock];
  for (int j = 0; j < kBlock; ++j) {
    float y = x[j] * inverse;
    y = y < 127.0f ? y : 127.0f;
    y = y > -127.0f ? y : -127.0f;
    const int32_t code = int32_t(float_bits(y + kMagic) & 0x7fffffu) - 0x400000;
    const int32_t kept = j < n ? code : 0;
    block[j] = int8_t(kept);
    sum += kept;
  }
  __builtin_memcpy(codes, block, kBlock);
  return sum;
}

template <class T>
TRANCHE_INLINE void quantize_row(const BitsQuantizeActivationsParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const uint32_t largest = largest_magnitude(x, p.inputs);
  const bool finite = largest < kInfinity;
  const float absmax = bits_float(largest);
  const float inverse = finite ? 127.0f / (absmax > kSmallestAbsmax ? absmax : kSmallestAbsmax) : 0.0f;
  p.scale[row] = finite ? absmax / 127.0f : bits_float(0x7fc00000u);

  const int64_t group = p.groups > 0 ? p.inputs / p.groups : p.inputs;
  float block[kBlock] = {};
  int8_t codes[kBlock];
  for (int64_t g = 0; g < p.groups; ++g) {
    int32_t sum = 0;
    for (int64_t i = g * group; i < (g + 1) * group;) {
      // blocks end at the group's end and at multiples of 64, where a tile's row ends
      const int64_t to_edge = kBlock - i % kBlock, to_end = (g + 1) * group - i;
      const int n = int(to_edge < to_end ? to_edge : to_end);
      row_to_float(x + i, block, n);
      if (finite) {
        sum += quantize_block(block, inverse, n, codes);
      } else {
        __builtin_memset(codes, 0, kBlock);
      }
      __builtin_memcpy(p.codes + code_offset(p, row, i), codes, size_t(n));
      i += n;
    }
    p.row_sum[row * p.groups + g] = sum;
  }
}

TRANCHE_INLINE void copy_row(const BitsQuantizeActivationsParams& p, int64_t row) {
  const int8_t* x = static_cast<const int8_t*>(p.x) + row * p.x_stride;
  int32_t sum = 0;
  for (int64_t i = 0; i < p.inputs; i += kBlock) {
    const int64_t n = p.inputs - i < kBlock ? p.inputs - i : kBlock;
    __builtin_memcpy(p.codes + code_offset(p, row, i), x + i, size_t(n));
    for (int64_t j = 0; j < n; ++j) sum += x[i + j];
  }
  p.row_sum[row] = sum;
}

TRANCHE_INLINE void pad_row(const BitsQuantizeActivationsParams& p, int64_t row) {
  for (int64_t i = row < p.rows ? p.inputs : 0; i < p.padded_inputs;) {
    const int64_t to_edge = kBlock - i % kBlock, to_end = p.padded_inputs - i;
    const int64_t n = to_edge < to_end ? to_edge : to_end;
    __builtin_memset(p.codes + code_offset(p, row, i), 0, size_t(n));
    i += n;
  }
}

void one_row(const BitsQuantizeActivationsParams& p, int64_t row) {
  if (row < p.rows) {
    if (p.x_is_codes) {
      copy_row(p, row);
    } else if (p.x_type == DType::f32) {
      quantize_row<float>(p, row);
    } else if (p.x_type == DType::f16) {
      quantize_row<half>(p, row);
    } else {
      quantize_row<bf16>(p, row);
    }
  }
  pad_row(p, row);
}

}  // namespace

void bits_quantize_activations(const BitsQuantizeActivationsParams& p) {
  const bool worth_threads = p.rows * p.inputs >= 65536;  // a few microseconds of one thread
  if (worth_threads) {
    parallel_for(p.padded_rows, [&p](int64_t row) { one_row(p, row); });
  } else {
    for (int64_t row = 0; row < p.padded_rows; ++row) one_row(p, row);
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, bits_quantize_activations, BitsQuantizeActivationsParams)
