// One row after the other: two weights, then a sum that the compiler vectorises.
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "tree/tree_merge_state.h"

namespace tranche::cpu::TRANCHE_ISA {
namespace {

// What a row is computed in: double for double, float for the rest.
template <class T>
struct Computed {
  using type = float;
  TRANCHE_INLINE float get(T x) { return to_float(x); }
  TRANCHE_INLINE T put(float x) { return from_float<T>(x == x ? x : __builtin_nanf("")); }
};
template <>
struct Computed<double> {
  using type = double;
  TRANCHE_INLINE double get(double x) { return x; }
  TRANCHE_INLINE double put(double x) { return x == x ? x : __builtin_nan(""); }
};

template <class T>
void merge_row(const TreeMergeStateParams& p, int64_t row) {
  using A = typename Computed<T>::type;
  const int64_t head = row % p.heads, node = row / p.heads % p.nodes, b = row / p.heads / p.nodes;
  const T* x =
      static_cast<const T*>(p.out_a) + b * p.a_stride[0] + node * p.a_stride[1] + head * p.a_stride[2];
  const T* y =
      static_cast<const T*>(p.out_b) + b * p.b_stride[0] + node * p.b_stride[1] + head * p.b_stride[2];
  T* out = static_cast<T*>(p.out) + row * p.head_dim;
  const float lse_a = p.lse_a[row], lse_b = p.lse_b[row];
  if (lse_a == -kInf || lse_b == -kInf) {
    const T* seen = lse_a == -kInf ? y : x;
    const bool nothing = lse_a == -kInf && lse_b == -kInf;
    if (nothing) memset(out, 0, sizeof(T) * size_t(p.head_dim));
    if (!nothing) memcpy(out, seen, sizeof(T) * size_t(p.head_dim));
    p.lse[row] = lse_a == -kInf ? lse_b : lse_a;
    return;
  }
  const double m = lse_a > lse_b ? lse_a : lse_b;
  const double e_a = __builtin_exp(lse_a - m), e_b = __builtin_exp(lse_b - m), sum = e_a + e_b;
  const A w_a = A(e_a / sum), w_b = A(e_b / sum);
  for (int d = 0; d < p.head_dim; ++d) {
    out[d] = Computed<T>::put(w_a * Computed<T>::get(x[d]) + w_b * Computed<T>::get(y[d]));
  }
  const bool is_nan = lse_a != lse_a || lse_b != lse_b;
  p.lse[row] = is_nan ? __builtin_nanf("") : (m == double(kInf) ? kInf : float(m + __builtin_log(sum)));
}

template <class T>
void merge(const TreeMergeStateParams& p) {
  // Waking threads pays from about a hundred thousand elements on.
  const bool worth_threads = p.rows * p.head_dim >= 131072;
  constexpr int64_t kRows = 64;
  const auto rows = [&](int64_t task) {
    const int64_t end = (task + 1) * kRows < p.rows ? (task + 1) * kRows : p.rows;
    for (int64_t row = task * kRows; row < end; ++row) merge_row<T>(p, row);
  };
  const int64_t tasks = (p.rows + kRows - 1) / kRows;
  if (worth_threads) {
    parallel_for(tasks, rows);
  } else {
    for (int64_t task = 0; task < tasks; ++task) rows(task);
  }
}

}  // namespace

void tree_merge_state(const TreeMergeStateParams& p) {
  with_type<double, float, half, bf16>("tree_merge_state", p.type, [&](auto t) { merge<decltype(t)>(p); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, tree_merge_state, TreeMergeStateParams)
