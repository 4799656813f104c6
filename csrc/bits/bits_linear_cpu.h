// What the CPU kernels of bits_linear share: the workspace, the share of a thread, and how sums become
// outputs.
#pragma once

#include "bits/bits_linear.h"
#include "bits/decode_cpu.h"
#include "core/tasks.h"

namespace tranche::cpu::TRANCHE_ISA {

#if defined(__AVX512F__)
constexpr int kMostRows = 8;  // rows of x whose sums stay in registers
#else
constexpr int kMostRows = 4;
#endif

TRANCHE_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Rows of x that the next pass over the weights takes, of which some may be padding: 1, 2, 4 or 8.
TRANCHE_INLINE int pass_rows(int64_t left) {
  int pass = 1;
  while (pass < left && pass < kMostRows) pass *= 2;
  return pass;
}

// How activations lie in the workspace: ready for the kernel, then their scales, then their sums, then
// scratch memory.
enum class Form {
  rows_of_codes,   // int8
  tiles_of_codes,  // int8, in tiles of 16 rows x 64 inputs
  bf16_pairs,
  floats,
};

struct Workspace {
  int64_t padded_rows, padded_inputs;
  int64_t scale, row_sum, scratch;  // x is at 0; where the others start
};

TRANCHE_INLINE Workspace workspace_of(const BitsLinearParams& p, Form form) {
  const bool tiles = form == Form::tiles_of_codes;
  Workspace s{};
  s.padded_inputs = round_up(p.w.in_features, tiles ? 64 : kTileInputs);
  const int64_t whole = p.rows / kMostRows * kMostRows, rest = p.rows - whole;
  s.padded_rows = tiles ? round_up(p.rows, 16) : whole + (rest > 0 ? pass_rows(rest) : 0);
  const int64_t element = form == Form::floats ? 4 : form == Form::bf16_pairs ? 2 : 1;
  s.scale = round_up(element * s.padded_rows * s.padded_inputs, 64);
  s.row_sum = s.scale + round_up(4 * p.rows, 64);
  s.scratch = s.row_sum + round_up(4 * p.rows * p.groups, 64);
  return s;
}

// Activations that are ready.
struct Activations {
  const void* x;
  const float* scale;      // of codes
  const int32_t* row_sum;  // of codes
  uint8_t* scratch;        // of the workers
  int64_t padded_rows, padded_inputs;
};

// How many threads share the rows of tiles, `step` at a time.
TRANCHE_INLINE int64_t workers(const BitsLinearParams& p, int64_t step) {
  const int64_t steps = (p.w.row_tiles + step - 1) / step;
  const bool worth_threads = p.w.out_features * p.w.in_features >= 65536;
  const int64_t threads = worth_threads ? num_threads() : 1;
  return threads < steps ? threads : steps;
}

// f(begin, end, scratch) on ranges of rows of tiles that begin at multiples of `step`; each worker has
// `scratch_bytes` of memory of its own.
template <class F>
TRANCHE_INLINE void share_row_tiles(const BitsLinearParams& p, int64_t step, const Activations& x,
                                    int64_t scratch_bytes, const F& f) {
  const int64_t tiles = p.w.row_tiles, steps = (tiles + step - 1) / step;
  parallel_shares(steps, workers(p, step), [&](int64_t begin, int64_t end, int64_t worker) {
    f(step * begin, step * end < tiles ? step * end : tiles, x.scratch + worker * scratch_bytes);
  });
}

// The 16 outputs of a row of tiles: their scales of one group, and zeros past the last.
static void load_scales(const BitsLinearParams& p, int64_t row_tile, int64_t group, float (&to)[16]) {
  const float* scale = p.scale + row_tile * kTileRows * p.groups + group;
  const int64_t left = p.w.out_features - row_tile * kTileRows;
  if (p.groups == 1 && left >= kTileRows) {
    __builtin_memcpy(to, scale, sizeof to);
    return;
  }
  for (int r = 0; r < kTileRows; ++r) to[r] = r < left ? scale[r * p.groups] : 0.0f;
}

static void load_bias(const BitsLinearParams& p, int64_t row_tile, float (&to)[16]) {
  const int64_t left = p.w.out_features - row_tile * kTileRows;
  for (int r = 0; r < kTileRows; ++r) to[r] = p.bias && r < left ? p.bias[row_tile * kTileRows + r] : 0.0f;
}

template <class T>
TRANCHE_INLINE void store_outputs(T* out, const float (&y)[16], int64_t n) {
#if defined(__AVX512F__)
  store16(out, vload(y), int(n));
#else
  for (int64_t r = 0; r < n; ++r) out[r] = from_float<T>(y[r]);
#endif
}

// y of 16 outputs of one row of x to its place.
static void store_row(const BitsLinearParams& p, int64_t row, int64_t row_tile, const float (&y)[16]) {
  const int64_t at = row * p.w.out_features + row_tile * kTileRows;
  const int64_t left = p.w.out_features - row_tile * kTileRows, n = left < kTileRows ? left : kTileRows;
  if (p.type == DType::f32) {
    store_outputs(static_cast<float*>(p.out) + at, y, n);
  } else if (p.type == DType::f16) {
    store_outputs(static_cast<half*>(p.out) + at, y, n);
  } else {
    store_outputs(static_cast<bf16*>(p.out) + at, y, n);
  }
}

// Sums of one row of x over one group, each 128 row_sum too large, scaled and added to y of 16 outputs.
static void add_integer_group(const void* sums, int32_t row_sum, const float (&scale)[16], float* y) {
  uint32_t sum[16];
  __builtin_memcpy(sum, sums, sizeof sum);
  for (int r = 0; r < kTileRows; ++r) {
    y[r] = y[r] + float(int32_t(sum[r] - 128u * uint32_t(row_sum))) * scale[r];
  }
}

static void add_float_group(const void* sums, const float (&scale)[16], float* y) {
  float sum[16];
  __builtin_memcpy(sum, sums, sizeof sum);
  for (int r = 0; r < kTileRows; ++r) y[r] = y[r] + sum[r] * scale[r];
}

// Multiplying with an x_scale of 1 changes nothing.
static void finish_row(const BitsLinearParams& p, int64_t row, int64_t row_tile, float x_scale,
                       const float (&bias)[16], const float* total) {
  float y[16];
  for (int r = 0; r < kTileRows; ++r) y[r] = total[r] * x_scale;
  if (p.bias) {
    for (int r = 0; r < kTileRows; ++r) y[r] = y[r] + bias[r];
  }
  store_row(p, row, row_tile, y);
}

static void store_integers(const BitsLinearParams& p, int64_t row, int64_t row_tile, const void* sums,
                           int32_t row_sum) {
  int32_t* out = static_cast<int32_t*>(p.out) + row * p.w.out_features + row_tile * kTileRows;
  const int64_t left = p.w.out_features - row_tile * kTileRows, n = left < kTileRows ? left : kTileRows;
  uint32_t sum[16];
  __builtin_memcpy(sum, sums, sizeof sum);
  for (int64_t r = 0; r < n; ++r) {
    out[r] = int32_t(sum[r] - 128u * uint32_t(row_sum)) >> (8 - p.w.bits);
  }
}

}  // namespace tranche::cpu::TRANCHE_ISA
