// Logits of a router on the CPU, and each token's choice of experts; shared by moe_route and moe_draft.
#pragma once

#include "core/parallel.h"
#include "moe/moe_engine_lanes_cpu.h"
#include "moe/moe_route.h"

namespace tranche::cpu::TRANCHE_ISA {

// Logits decide: they are summed in fp32 products at least.
template <class T>
struct LogitsEngine {
  using type = FmaEngine;
};
template <>
struct LogitsEngine<double> {
  using type = F64Engine;
};

// logits[t][r] = <x[t], router[r]>, [tokens][padded_rows].
template <class Engine, class T>
class Logits {
 public:
  using Compute = typename Engine::Compute;

  Logits(const void* x, int64_t x_stride, const void* router, int64_t router_stride, int tokens, int rows,
         int hidden, void* workspace)
      : x_(static_cast<const T*>(x)),
        x_stride_(x_stride),
        router_{static_cast<const T*>(router), router_stride, rows, hidden},
        tokens_(tokens),
        padded_rows_(int(round_up(rows, kTileRows))) {
    Arena arena(workspace);
    const int64_t panels = (tokens + kPanel - 1) / kPanel;
    values_ = arena.take<Compute>(int64_t(tokens) * padded_rows_);
    panels_ = arena.take<char>(panels * Engine::panel_bytes(hidden));
    results_ = arena.take<Compute>(panels * tasks_per_panel() * kPanel * kTileRows);
    scratch_ = arena.take<char>(panels * tasks_per_panel() * scratch_bytes());
    bytes_ = arena.used();
  }

  int64_t bytes() const { return bytes_; }
  int padded_rows() const { return padded_rows_; }
  Compute* of(int64_t token) const { return values_ + token * padded_rows_; }

  void run() const {
    const int64_t panels = (tokens_ + kPanel - 1) / kPanel, bytes = Engine::panel_bytes(router_.columns);
    parallel_for(panels, [&](int64_t panel) {
      const T* rows[kPanel];
      for (int c = 0; c < kPanel; ++c) {
        const int64_t token = panel * kPanel + c;
        rows[c] = token < tokens_ ? x_ + token * x_stride_ : nullptr;
      }
      Engine::pack(rows, router_.columns, panels_ + panel * bytes);
    });
    parallel_for(panels * tasks_per_panel(), [&](int64_t task) {
      const int64_t panel = task / tasks_per_panel();
      const int row = int(task % tasks_per_panel()) * kTileRows;
      const int columns = int(least<int64_t>(tokens_ - panel * kPanel, kPanel));
      Compute* result = results_ + task * kPanel * kTileRows;
      const T* nothing = nullptr;
      Engine::product(router_, row, panels_ + panel * bytes, columns, result,
                      scratch_ + task * scratch_bytes(), nothing);
      for (int c = 0; c < columns; ++c) {
        memcpy(of(panel * kPanel + c) + row, result + c * kTileRows, kTileRows * sizeof(Compute));
      }
    });
  }

 private:
  int64_t tasks_per_panel() const { return padded_rows_ / kTileRows; }
  static int64_t scratch_bytes() { return round_up(Engine::scratch_bytes(), 64); }

  const T* x_;
  int64_t x_stride_;
  Rows<T> router_;
  int tokens_, padded_rows_;
  int64_t bytes_;
  Compute *values_, *results_;
  char *panels_, *scratch_;
};

// libm's own functions: an inline overload of <cmath> would be one weak symbol for all instruction sets.
TRANCHE_INLINE float exp_of(float x) { return __builtin_expf(x); }
TRANCHE_INLINE double exp_of(double x) { return __builtin_exp(x); }
TRANCHE_INLINE float sqrt_of(float x) { return __builtin_sqrtf(x); }
TRANCHE_INLINE double sqrt_of(double x) { return __builtin_sqrt(x); }

template <class C>
constexpr C kLargest = C(3.4028234663852886e38);
template <class C>
constexpr C kLowest = C(-__builtin_inf());

// One token's choice, in Compute arithmetic. `logits` [E] become scores; `ranking` is scratch [E].
template <class C>
class Choice {
 public:
  Choice(const MoeRouteParams& p, C* logits, C* ranking) : p_(p), scores_(logits), ranking_(ranking) {}

  void run(C* weights, int32_t* ids) const {
    score();
    keep_top_groups();
    C total = 0;
    for (int k = 0; k < p_.top_k; ++k) {
      ids[k] = take_best();
      weights[k] = scores_[ids[k]];
      total += weights[k];
    }
    for (int k = 0; k < p_.top_k; ++k) {
      if (p_.renormalize) weights[k] = total != 0 ? weights[k] / total : C(0);
      weights[k] *= C(p_.scale);
    }
  }

 private:
  static constexpr C kTaken = C(__builtin_nan(""));  // compares with nothing

  void score() const {
    C highest = kLowest<C>;
    for (int e = 0; e < p_.experts; ++e) {
      C l = scores_[e];
      l = l > kLargest<C> ? kLargest<C> : (l < -kLargest<C> ? -kLargest<C> : l);
      scores_[e] = l == l ? l : kLowest<C>;
      if (scores_[e] > highest) highest = scores_[e];
    }
    // squares of such logits would overflow in fp32
    const bool huge = highest > C(1e15);
    const C unit = huge ? highest : C(1);
    C total = 0;
    for (int e = 0; e < p_.experts; ++e) {
      const bool dead = scores_[e] == kLowest<C>;
      C& s = scores_[e];
      if (p_.score == RouteScore::softmax) s = dead ? C(0) : exp_of(s - highest);
      if (p_.score == RouteScore::sigmoid) s = dead ? C(0) : C(1) / (C(1) + exp_of(-s));
      if (p_.score == RouteScore::relu_rms) s = s > 0 ? s / unit : C(0);
      total += p_.score == RouteScore::relu_rms ? s * s : s;
      ranking_[e] = dead ? kLowest<C> : C(0);
    }
    const C factor = p_.score == RouteScore::softmax ? (total > 0 ? C(1) / total : C(0))
                     : p_.score == RouteScore::relu_rms
                         ? C(1) / sqrt_of(total / p_.experts + C(p_.eps) / unit / unit)
                         : C(1);
    for (int e = 0; e < p_.experts; ++e) {
      scores_[e] *= factor;
      if (p_.score == RouteScore::relu_rms && p_.rms_weight) scores_[e] *= C(p_.rms_weight[e]);
      const C rank = p_.bias ? scores_[e] + C(p_.bias[e]) : scores_[e];
      const bool ranks = ranking_[e] != kLowest<C> && rank == rank;
      ranking_[e] = ranks ? rank : kLowest<C>;
    }
  }

  void keep_top_groups() const {
    if (p_.top_groups >= p_.groups) return;
    const int size = p_.experts / p_.groups;
    C values[kMaxExperts];
    for (int g = 0; g < p_.groups; ++g) {
      C best = kLowest<C>, second = kLowest<C>;
      for (int e = g * size; e < (g + 1) * size; ++e) {
        const C rank = ranking_[e];
        if (rank > best) {
          second = best;
          best = rank;
        } else if (rank > second) {
          second = rank;
        }
      }
      const C sum = size > 1 ? best + second : best;
      values[g] = sum == sum ? sum : kLowest<C>;
    }
    bool kept[kMaxExperts] = {};
    for (int n = 0; n < p_.top_groups; ++n) kept[take(values, p_.groups)] = true;
    for (int g = 0; g < p_.groups; ++g) {
      for (int e = g * size; !kept[g] && e < (g + 1) * size; ++e) ranking_[e] = kTaken;
    }
  }

  int take_best() const { return take(ranking_, p_.experts); }

  // The lowest index of the largest value, which is then taken.
  static int take(C* values, int n) {
    int best = -1;
    for (int i = 0; i < n; ++i) {
      if (values[i] == values[i] && (best < 0 || values[i] > values[best])) best = i;
    }
    values[best] = kTaken;
    return best;
  }

  const MoeRouteParams& p_;
  C *scores_, *ranking_;
};

}  // namespace tranche::cpu::TRANCHE_ISA
