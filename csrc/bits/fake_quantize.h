// Rounding to a grid in floating point, as training does it: the arithmetic of both fake-quantization ops,
// one operation after another, so that every backend finds the same bits. T is float or double.
#pragma once

#include <cstdint>

#include "core/numeric.h"

namespace tranche {

// To an integer, half to even, for |v| < 2^22: the sum with 1.5 * 2^(mantissa bits) has no fraction. NaN
// stays.
TRANCHE_HD float round_even(float v) { return (v + 12582912.0f) - 12582912.0f; }
TRANCHE_HD double round_even(double v) { return (v + 6755399441055744.0) - 6755399441055744.0; }

// a * b + c in two roundings, which CUDA would contract to one.
TRANCHE_HD float multiply_then_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}
TRANCHE_HD double multiply_then_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(__dmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}

// min(max(v, low), high), and NaN for NaN.
template <class T>
TRANCHE_HD T clamp_to(T v, T low, T high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// The grids of h stored and l used bits: W_h in [low, high], W_l * 2^(h-l) at most top.
template <class T>
struct WeightGrid {
  T low, high;   // -2^(h-1), 2^(h-1) - 1
  T top;         // 2^(l-1) - 1
  T step, down;  // 2^(h-l), 2^-(h-l)
  T half_up;     // what makes half to even round half up: half of `down`, or nothing to round
};

template <class T>
TRANCHE_HD WeightGrid<T> weight_grid(int bits, int stored_bits) {
  const T step = T(1 << (stored_bits - bits)), down = T(1) / step;
  const T half = T(1 << (stored_bits - 1));
  return {-half, half - 1, T(1 << (bits - 1)) - 1, step, down, bits == stored_bits ? T(0) : down / 2};
}

// A weight on its grid: code = W_l * 2^(h-l), which times the scale is the fake-quantized weight, and
// d(code * scale) / d scale = slope. Both clips hold a weight that is not `inside`.
template <class T>
struct GridWeight {
  T code, slope;
  bool inside;
};

template <class T>
TRANCHE_HD GridWeight<T> weight_on_grid(T w, T scale, const WeightGrid<T>& grid) {
  const T v = w / scale;
  const T rounded = round_even(clamp_to(v, T(-1024), T(1024)));
  const T stored = clamp_to(rounded, grid.low, grid.high);
  const T used = round_even(stored * grid.down + grid.half_up);  // an exact product
  GridWeight<T> on;
  on.code = (used > grid.top ? grid.top : used) * grid.step;
  on.inside = rounded >= grid.low && rounded <= grid.high && used <= grid.top;
  on.slope = on.inside ? on.code - v : on.code;
  return on;
}

// An activation on the unsigned grid of b bits: value = q * scale + zero, its derivatives by scale and zero.
template <class T>
struct GridActivation {
  T value, by_scale, by_zero;
  bool inside;
};

template <class T>
TRANCHE_HD GridActivation<T> activation_on_grid(T x, T scale, T zero, T top) {
  const T v = (x - zero) / scale;
  const T rounded = round_even(clamp_to(v, T(-1024), T(1024)));
  const T q = clamp_to(rounded, T(0), top);
  GridActivation<T> on;
  on.value = multiply_then_add(q, scale, zero);
  on.inside = rounded >= T(0) && rounded <= top;
  on.by_scale = on.inside ? q - v : q;
  on.by_zero = on.inside ? T(0) : T(1);
  return on;
}

}  // namespace tranche
