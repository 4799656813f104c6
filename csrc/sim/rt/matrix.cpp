// ldmatrix and mma.sync with the fragment layouts of the PTX ISA ("Matrix Fragments for mma.m16n8k16" and its
// neighbours). Sums run over k in ascending order, each product and each sum rounded once to float; products
// of two halves or bf16s are exact, so that equals a chain of fmas. The hardware's order is its own secret:
// results agree to rounding, and integers exactly.
#include "core/numeric.h"
#include "sim/rt/findings.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TRANCHE_SIM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TRANCHE_SIM_CLONES
#endif

namespace tranche::sim {

namespace {

// The register of a lane that holds row r, and the columns it holds: `per` elements from (lane % 4) * per on.
struct Place {
  uint32_t group, in_group;
  explicit Place(uint32_t lane) : group(lane / 4), in_group(lane % 4) {}
};

TRANCHE_SIM_CLONES void multiply(const float* a, const float* b, float* d, int k_size) {
  for (int m = 0; m < 16; ++m) {
    float sum[8];
    for (int n = 0; n < 8; ++n) sum[n] = d[m * 8 + n];
    for (int k = 0; k < k_size; ++k) {
      const float x = a[m * k_size + k];
      for (int n = 0; n < 8; ++n) sum[n] += x * b[k * 8 + n];
    }
    for (int n = 0; n < 8; ++n) d[m * 8 + n] = sum[n];
  }
}

TRANCHE_SIM_CLONES void multiply(const int32_t* a, const int32_t* b, uint32_t* d, int k_size) {
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < k_size; ++k) {
      const int32_t x = a[m * k_size + k];
      for (int n = 0; n < 8; ++n) d[m * 8 + n] += uint32_t(x * b[k * 8 + n]);
    }
  }
}

// Sixteen-bit elements come in pairs: register j of A is row (j % 2) * 8 + group, columns j / 2 * 8 + ...;
// register j of B is rows j * 8 + ..., column group.
template <class T>
void mma_16_bit(Warp& warp, int k_size) {
  float a[16 * 16], b[16 * 8], d[16 * 8];
  for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
    const Thread& t = lane_of(warp, lane);
    const Place p(lane);
    for (int j = 0; j < k_size / 4; ++j) {
      const uint32_t row = p.group + uint32_t(j % 2) * 8, column = p.in_group * 2 + uint32_t(j / 2) * 8;
      a[row * uint32_t(k_size) + column] = to_float(T{uint16_t(t.a[j])});
      a[row * uint32_t(k_size) + column + 1] = to_float(T{uint16_t(t.a[j] >> 16)});
    }
    for (int j = 0; j < k_size / 8; ++j) {
      const uint32_t row = p.in_group * 2 + uint32_t(j) * 8;
      b[row * 8 + p.group] = to_float(T{uint16_t(t.b[j])});
      b[(row + 1) * 8 + p.group] = to_float(T{uint16_t(t.b[j] >> 16)});
    }
    for (uint32_t i = 0; i < 4; ++i) d[(p.group + i / 2 * 8) * 8 + p.in_group * 2 + i % 2] = t.d.f32[i];
  }
  multiply(a, b, d, k_size);
  for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
    const Place p(lane);
    for (uint32_t i = 0; i < 4; ++i) {
      lane_of(warp, lane).d.f32[i] = d[(p.group + i / 2 * 8) * 8 + p.in_group * 2 + i % 2];
    }
  }
}

// Bytes come in fours, with 16 columns between the halves of A and of B.
template <class T>
void mma_8_bit(Warp& warp, int k_size) {
  int32_t a[16 * 32], b[32 * 8];
  uint32_t d[16 * 8];
  for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
    const Thread& t = lane_of(warp, lane);
    const Place p(lane);
    for (int j = 0; j < k_size / 8; ++j) {
      const uint32_t row = p.group + uint32_t(j % 2) * 8, column = p.in_group * 4 + uint32_t(j / 2) * 16;
      for (uint32_t i = 0; i < 4; ++i) a[row * uint32_t(k_size) + column + i] = T(t.a[j] >> (8 * i));
    }
    for (int j = 0; j < k_size / 16; ++j) {
      const uint32_t row = p.in_group * 4 + uint32_t(j) * 16;
      for (uint32_t i = 0; i < 4; ++i) b[(row + i) * 8 + p.group] = int8_t(t.b[j] >> (8 * i));
    }
    for (uint32_t i = 0; i < 4; ++i) d[(p.group + i / 2 * 8) * 8 + p.in_group * 2 + i % 2] = t.d.u32[i];
  }
  multiply(a, b, d, k_size);
  for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
    const Place p(lane);
    for (uint32_t i = 0; i < 4; ++i) {
      lane_of(warp, lane).d.u32[i] = d[(p.group + i / 2 * 8) * 8 + p.in_group * 2 + i % 2];
    }
  }
}

}  // namespace

void run_mma(Warp& warp, WarpOp op) {
  ++machine.counters.mma;
  switch (op) {
    case WarpOp::mma_m16n8k8_bf16:
      return mma_16_bit<bf16>(warp, 8);
    case WarpOp::mma_m16n8k8_f16:
      return mma_16_bit<half>(warp, 8);
    case WarpOp::mma_m16n8k16_bf16:
      return mma_16_bit<bf16>(warp, 16);
    case WarpOp::mma_m16n8k16_f16:
      return mma_16_bit<half>(warp, 16);
    case WarpOp::mma_m16n8k16_s8:
      return mma_8_bit<int8_t>(warp, 16);
    case WarpOp::mma_m16n8k16_u8:
      return mma_8_bit<uint8_t>(warp, 16);
    case WarpOp::mma_m16n8k32_s8:
      return mma_8_bit<int8_t>(warp, 32);
    case WarpOp::mma_m16n8k32_u8:
      return mma_8_bit<uint8_t>(warp, 32);
    default:
      return;
  }
}

// The row of lane 8 m + r is row r of matrix m. Lane l receives of each matrix elements 2 (l % 4) and the
// next of row l / 4; transposed, of column l / 4. A row counts as read by the lane that gave its address.
void run_ldmatrix(Warp& warp, bool transposed) {
  const uint32_t matrices = lane_of(warp, 0).argument;
  uint16_t element[4][8][8];
  for (uint32_t lane = 0; lane < matrices * 8; ++lane) {
    Thread& thread = lane_of(warp, lane);
    const auto address = reinterpret_cast<uintptr_t>(thread.row);
    if (!warp.block->shared.contains(address)) {
      report_and_stop(&thread, "ldmatrix: the row address is not in the block's shared memory", thread.site,
                      thread.pc);
    }
    if (address % 16 != 0) {
      report_and_stop(
          &thread,
          "misaligned: ldmatrix needs 16-byte aligned rows, this is " + address_text(*warp.block, address),
          thread.site, thread.pc);
    }
    if (checked != nullptr) check_access(thread, {address, 16, thread.pc, false, false});
    memcpy(element[lane / 8][lane % 8], thread.row, 16);
  }
  for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
    const uint32_t i = lane / 4, j = lane % 4 * 2;
    for (uint32_t m = 0; m < matrices; ++m) {
      const uint16_t low = transposed ? element[m][j][i] : element[m][i][j];
      const uint16_t high = transposed ? element[m][j + 1][i] : element[m][i][j + 1];
      lane_of(warp, lane).d.u32[m] = uint32_t(high) << 16 | low;
    }
  }
}

}  // namespace tranche::sim
