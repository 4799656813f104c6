// The experts on the CPU over any engine: pack the columns, gate and up, down and sum. Weights are read once
// per 64 tokens of an expert, from memory the first time. Tasks are tiles of 16 rows, of which some
// engines take several together.
#pragma once

#include "core/tasks.h"
#include "moe/moe_activation_cpu.h"
#include "moe/moe_engine_lanes_cpu.h"
#include "moe/moe_engine_packed_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

TRANCHE_INLINE void store_value(float* p, float x) { *p = x; }
TRANCHE_INLINE void store_value(double* p, double x) { *p = x; }
TRANCHE_INLINE void store_value(half* p, float x) { *p = from_float<half>(x); }
TRANCHE_INLINE void store_value(bf16* p, float x) { *p = from_float<bf16>(x); }
TRANCHE_INLINE double load_value(const double* p) { return *p; }
template <class T>
TRANCHE_INLINE float load_value(const T* p) {
  return to_float(*p);
}

// sum[r] += coefficient * values[r] for 16 rows, each operation rounded.
TRANCHE_INLINE void add_scaled(float* sum, float coefficient, const float* values) {
  for (int r = 0; r < kTileRows; r += kWidth) {
    vstore(sum + r, vadd(vload(sum + r), vmul(vset(coefficient), vload(values + r))));
  }
}
TRANCHE_INLINE void add_scaled(double* sum, double coefficient, const double* values) {
  for (int r = 0; r < kTileRows; ++r) sum[r] += coefficient * values[r];
}

// An expert with tokens. Its panels of columns are consecutive.
struct ActiveExpert {
  int32_t expert, first_slot, count, first_panel;
};

// T: x and outputs; W: weights.
template <class Engine, class T, class W>
class Experts {
 public:
  using Compute = typename Engine::Compute;
  static constexpr int kTilesTogether = Engine::kTilesTogether;

  explicit Experts(const MoeExpertsParams& p) : p_(p), workers_(num_threads()) {
    for (int e = 0; e < p.experts; ++e) {
      const int count = p.offsets[e + 1] - p.offsets[e];
      active_ += count > 0;
      panels_ += (count + kPanel - 1) / kPanel;
      // with ascending slots, as many as tokens and one for each token, columns are tokens
      every_token_ = every_token_ && (count == 0 || serves_every_token(e));
    }
    x_panels_ = every_token_ ? (p.tokens + kPanel - 1) / kPanel : panels_;
    Arena arena(p.workspace);
    list_ = arena.take<ActiveExpert>(active_);
    x_ = arena.take<char>(x_panels_ * Engine::panel_bytes(p.hidden));
    h_ = arena.take<char>(panels_ * Engine::panel_bytes(p.inner));
    sums_ = arena.take<Compute>(workers_ * kTilesTogether * tile_sums());
    tiles_ = arena.take<Compute>(int64_t(workers_) * 3 * kTilesTogether * kGroupColumns * kTileRows);
    scratch_ = arena.take<char>(workers_ * round_up(Engine::scratch_bytes(), 64));
    bytes_ = arena.used();
    if (!p.workspace) return;
    int at = 0;
    int32_t panel = 0;
    for (int e = 0; e < p.experts; ++e) {
      const int count = p.offsets[e + 1] - p.offsets[e];
      if (count == 0) continue;
      list_[at++] = {e, p.offsets[e], count, panel};
      panel += (count + kPanel - 1) / kPanel;
    }
  }

  int64_t bytes() const { return bytes_; }

  void run() const {
    pack();
    gate_and_up();
    down();
  }

 private:
  bool serves_every_token(int e) const {
    if (p_.offsets[e + 1] - p_.offsets[e] != p_.tokens) return false;
    for (int i = 0; i < p_.tokens; ++i) {
      if (p_.slots[p_.offsets[e] + i] / p_.top_k != i) return false;
    }
    return true;
  }

  char* scratch(int64_t worker) const { return scratch_ + worker * round_up(Engine::scratch_bytes(), 64); }
  Compute* tiles(int64_t worker, int index) const {
    return tiles_ + (worker * 3 + index) * kTilesTogether * kGroupColumns * kTileRows;
  }
  int64_t tile_sums() const { return int64_t(p_.outputs) * p_.tokens * kTileRows; }
  // How many of the tasks left to a worker are done together.
  static int together(int64_t left) { return int(least<int64_t>(left, kTilesTogether)); }
  // Rows before `end`: where a product stops.
  static Rows<W> up_to(Rows<W> w, [[maybe_unused]] int end) {
    if constexpr (kTilesTogether > 1) w.rows = least(w.rows, end);
    return w;
  }
  Rows<W> matrix(const ExpertMatrices& m, int expert, int rows, int columns) const {
    if constexpr (__is_same(W, Packed)) {
      return {packed_expert(m, expert, rows, columns, p_.bits)};
    } else {
      return {static_cast<const W*>(m.data) + expert * m.stride[0], m.stride[1], rows, columns};
    }
  }

  void pack() const {
    const T* x = static_cast<const T*>(p_.x);
    const int64_t bytes = Engine::panel_bytes(p_.hidden);
    if (every_token_) {
      parallel_for(x_panels_, [&](int64_t panel) {
        const T* rows[kPanel];
        for (int c = 0; c < kPanel; ++c) {
          const int64_t token = panel * kPanel + c;
          rows[c] = token < p_.tokens ? x + token * p_.x_stride : nullptr;
        }
        Engine::pack(rows, p_.hidden, x_ + panel * bytes);
      });
      return;
    }
    parallel_for(active_, [&](int64_t i) {
      const ActiveExpert& a = list_[i];
      for (int first = 0; first < a.count; first += kPanel) {
        const T* rows[kPanel];
        for (int c = 0; c < kPanel; ++c) {
          const bool used = first + c < a.count;
          rows[c] = used ? x + p_.slots[a.first_slot + first + c] / p_.top_k * p_.x_stride : nullptr;
        }
        Engine::pack(rows, p_.hidden, x_ + (a.first_panel + first / kPanel) * bytes);
      }
    });
  }

  static void scale_rows(const ExpertMatrices& m, int expert, int rows, int first_row, int columns,
                         Compute* values) {
    if (!m.scale) return;
    const float* scale = m.scale + int64_t(expert) * rows + first_row;
    const int used = least(rows - first_row, kTileRows);
    for (int c = 0; c < columns; ++c) {
      for (int r = 0; r < used; ++r) values[c * kTileRows + r] *= Compute(scale[r]);
    }
  }

  // One task: 16 features of one expert. Features past I are 0, so that down's depth is whole.
  void gate_and_up() const {
    const int tasks = int(round_up(p_.inner, 32) / kTileRows);
    const int64_t x_bytes = Engine::panel_bytes(p_.hidden), h_bytes = Engine::panel_bytes(p_.inner);
    parallel_shares(int64_t(active_) * tasks, workers_, [&](int64_t begin, int64_t end, int64_t worker) {
      [[maybe_unused]] const typename Engine::Session session{};
      Compute *gated = tiles(worker, 0), *raised = tiles(worker, 1);
      for (int64_t task = begin; task < end;) {
        const ActiveExpert& a = list_[task / tasks];
        const int tile = int(task % tasks), count = int(least<int64_t>(together(end - task), tasks - tile));
        const int row = tile * kTileRows, after_row = row + count * kTileRows;
        task += count;
        const Rows<W> up = up_to(matrix(p_.up, a.expert, p_.inner, p_.hidden), after_row);
        const Rows<W> gate =
            p_.gate.data ? up_to(matrix(p_.gate, a.expert, p_.inner, p_.hidden), after_row) : up;
        const W* next = after_row + kTileRows <= p_.inner ? gate.row(after_row) : nullptr;
        const char* x = x_ + (every_token_ ? 0 : a.first_panel) * x_bytes;
        for (int first = 0; first < a.count; first += kGroupColumns) {
          const int columns = least(a.count - first, kGroupColumns);
          const char* panels = x + first / kPanel * x_bytes;
          const W* after = first + kGroupColumns >= a.count ? next : nullptr;
          if (row < p_.inner) {
            if (p_.gate.data) {
              const bool whole = row + kTileRows <= p_.inner;
              Engine::product(gate, row, panels, columns, gated, scratch(worker),
                              whole ? up.row(row) : nullptr);
            }
            Engine::product(up, row, panels, columns, raised, scratch(worker), after);
          }
          char* to = h_ + (a.first_panel + first / kPanel) * h_bytes;
          for (int t = 0; t < count; ++t) {
            const int at = t * columns * kTileRows;
            put_features(a.expert, row + t * kTileRows, columns, gated + at, raised + at, tiles(worker, 2),
                         to);
          }
        }
      }
    });
  }

  // 16 features, made of what gate and up gave, to the panels of h.
  void put_features(int expert, int row, int columns, Compute* gated, Compute* raised, Compute* h,
                    char* to) const {
    if (row < p_.inner) {
      if (p_.gate.data) scale_rows(p_.gate, expert, p_.inner, row, columns, gated);
      scale_rows(p_.up, expert, p_.inner, row, columns, raised);
      activate(p_.activation, p_.gate.data ? gated : nullptr, raised, h, columns * kTileRows);
    }
    // those of rows past the matrix may be NaN, if a column holds an infinity
    const int used = int(most<int64_t>(0, least<int64_t>(p_.inner - row, kTileRows)));
    for (int c = 0; used < kTileRows && c < columns; ++c) {
      for (int r = used; r < kTileRows; ++r) h[c * kTileRows + r] = 0;
    }
    if (row >= round_up(p_.inner, kTileRows) && !keeps_half_tiles()) return;
    for (int c = 0; c < int(round_up(columns, kPanel)); ++c) {
      const Compute zeros[kTileRows] = {};
      Engine::put(to + c / kPanel * Engine::panel_bytes(p_.inner), p_.inner, c % kPanel, row,
                  c < columns ? h + c * kTileRows : zeros);
    }
  }

  // Whether a panel has room for the 16 features that fill up I to a multiple of 32.
  bool keeps_half_tiles() const {
    return Engine::panel_bytes(p_.inner) == Engine::panel_bytes(int(round_up(p_.inner, 32)));
  }

  // One task: 16 columns of the outputs, all experts.
  void down() const {
    const int tasks = int(round_up(p_.hidden, kTileRows) / kTileRows);
    const int64_t h_bytes = Engine::panel_bytes(p_.inner);
    parallel_shares(tasks, workers_, [&](int64_t begin, int64_t end, int64_t worker) {
      [[maybe_unused]] const typename Engine::Session session{};
      Compute* yields = tiles(worker, 0);
      Compute* sums = sums_ + worker * kTilesTogether * tile_sums();
      for (int64_t task = begin; task < end;) {
        const int count = together(end - task), row = int(task) * kTileRows;
        const int after_row = row + count * kTileRows;
        task += count;
        memset(sums, 0, size_t(count * tile_sums()) * sizeof(Compute));
        for (int i = 0; i < active_; ++i) {
          const ActiveExpert& a = list_[i];
          const Rows<W> w = up_to(matrix(p_.down, a.expert, p_.hidden, p_.inner), after_row);
          // the next expert's rows, or after the last expert the first one's next rows
          const bool last = i + 1 == active_;
          const int next_row = last ? after_row : row;
          const W* next =
              next_row + kTileRows <= p_.hidden
                  ? matrix(p_.down, list_[last ? 0 : i + 1].expert, p_.hidden, p_.inner).row(next_row)
                  : nullptr;
          for (int first = 0; first < a.count; first += kGroupColumns) {
            const int columns = least(a.count - first, kGroupColumns);
            const W* after = first + kGroupColumns >= a.count ? next : nullptr;
            Engine::product(w, row, h_ + (a.first_panel + first / kPanel) * h_bytes, columns, yields,
                            scratch(worker), after);
            for (int t = 0; t < count; ++t) {
              Compute* values = yields + t * columns * kTileRows;
              scale_rows(p_.down, a.expert, p_.hidden, row + t * kTileRows, columns, values);
              add_yields(a.first_slot + first, columns, values, sums + t * tile_sums());
            }
          }
        }
        for (int t = 0; t < count; ++t) write(sums + t * tile_sums(), row + t * kTileRows);
      }
    });
  }

  // What an expert gave the tokens of slots [first, first + columns), times their coefficients.
  void add_yields(int first, int columns, const Compute* values, Compute* sums) const {
    const int64_t slots = int64_t(p_.tokens) * p_.top_k;
    const Compute* coefficients = static_cast<const Compute*>(p_.coefficients);
    for (int c = 0; c < columns; ++c) {
      const int32_t slot = p_.slots[first + c];
      for (int o = 0; o < p_.outputs; ++o) {
        const Compute coefficient = coefficients[o * slots + slot];
        if (coefficient == 0) continue;
        Compute* sum = sums + (int64_t(o) * p_.tokens + slot / p_.top_k) * kTileRows;
        add_scaled(sum, coefficient, values + c * kTileRows);
      }
    }
  }

  void write(const Compute* sums, int row) const {
    const int used = least(p_.hidden - row, kTileRows);
    for (int o = 0; o < p_.outputs; ++o) {
      T* out = static_cast<T*>(p_.out[o]) + row;
      for (int64_t t = 0; t < p_.tokens; ++t, sums += kTileRows) {
        const T* residual =
            p_.residual ? static_cast<const T*>(p_.residual) + t * p_.residual_stride + row : nullptr;
        write_row(sums, residual, out + t * p_.hidden, used);
      }
    }
  }

  static void write_row(const Compute* sums, const T* residual, T* out, int n) {
#if defined(__AVX512F__)
    if constexpr (!__is_same(T, double)) {
      const Vec y = vload(sums);
      store16(out, residual ? vadd(y, load16(residual, n)) : y, n);
      return;
    }
#endif
    for (int r = 0; r < n; ++r) store_value(out + r, residual ? sums[r] + load_value(residual + r) : sums[r]);
  }

  const MoeExpertsParams& p_;
  int workers_, active_ = 0;
  int64_t panels_ = 0, x_panels_ = 0, bytes_ = 0;
  bool every_token_ = true;
  ActiveExpert* list_ = nullptr;
  char *x_ = nullptr, *h_ = nullptr, *scratch_ = nullptr;
  Compute *sums_ = nullptr, *tiles_ = nullptr;
};

}  // namespace tranche::cpu::TRANCHE_ISA
