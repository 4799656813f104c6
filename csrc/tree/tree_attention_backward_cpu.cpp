// One pass over the cache per KV head: a tile of 64 slots meets all rows of the head's tree, 64 at a time.
// The tile's grad_k and grad_v are complete when it has met them all; grad_q of all rows stays in fp32 until
// the last tile.
//
// A sequence and KV head is one task. Under a block table sequences may share pages, so there one task takes
// a KV head of all sequences, in order: nothing is added by two threads, and the order of every sum is fixed.
#include "tree/tree_attention_backward.h"

#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "tree/tree_attention_backward_cpu.h"
#include "tree/tree_visibility.h"

namespace tranche::cpu::TRANCHE_ISA {
namespace {

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
template <class T>
T least(T a, T b) {
  return a < b ? a : b;
}

// A worker's memory. Without memory it only counts.
template <class A>
struct Scratch {
  A *q, *grad_out, *grad_q;      // [rows, D]
  RowState<A>* state;            // [rows]
  RowSums<A>* sums;              // [rows]
  bool* broken;                  // [rows]
  uint64_t* visible;             // [rows] of the tile at hand
  A *k, *k_columns, *v_columns;  // [64, D], [D, 64] twice
  A *grad_k, *grad_v;            // [64, D]
  A *scores, *gradients;         // [64 rows, 64 slots]
  A* row;                        // [D]
  int64_t bytes = 0;

  Scratch(const TreeAttentionParams& p, char* memory) {
    const int64_t rows = int64_t(p.nodes) * (p.heads_q / p.heads_kv), dim = p.head_dim;
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = memory ? reinterpret_cast<decltype(&*pointer)>(memory + bytes) : nullptr;
      bytes += round_up(count * int64_t(sizeof(*pointer)), 64);
    };
    A** of_rows[] = {&q, &grad_out, &grad_q};
    for (A** pointer : of_rows) take(*pointer, rows * dim);
    take(state, rows);
    take(sums, rows);
    take(broken, rows);
    take(visible, rows);
    A** of_slots[] = {&k, &k_columns, &v_columns, &grad_k, &grad_v};
    for (A** pointer : of_slots) take(*pointer, kTile * dim);
    take(scores, kTile * kTile);
    take(gradients, kTile * kTile);
    take(row, dim);
    bytes = round_up(bytes, 4096) + 256;  // the odd 256 keep workers out of each other's cache sets
  }
};

int64_t tasks_of(const TreeAttentionParams& p) {
  return p.block_table ? p.heads_kv : int64_t(p.batch) * p.heads_kv;
}
int64_t workers_of(const TreeAttentionParams& p) { return least<int64_t>(num_threads(), tasks_of(p)); }

template <class T, class A>
class Backward {
  // In fp32 and fp64 the rounding of lse and of <grad_out, out>, shared by all weights of a row, would be the
  // largest error by far: both sums are found again from the very products that become gradients.
  static constexpr bool kOwnSums = sizeof(T) >= 4;

 public:
  Backward(const TreeAttentionBackwardParams& params, char* memory)
      : p_(params.forward),
        params_(params),
        s_(p_, memory),
        group_(p_.heads_q / p_.heads_kv),
        dim_(p_.head_dim) {}

  void sequence(int b, int head) {
    b_ = b, head_ = head;
    nodes_ = slots::node_count(p_, b);
    length_ = slots::committed(p_, b, nodes_);
    rows_ = nodes_ * group_;
    if (rows_ == 0) return;
    int64_t begin = length_;
    for (int i = 0; i < nodes_; ++i) begin = least(begin, slots::window_begin(p_, b, length_, i));
    const int first = int(begin / kTile * kTile), end = length_ + nodes_;
    load_rows();
    if constexpr (kOwnSums) {
      for (int slot = first; slot < end; slot += kTile) accumulate(slot, least(end - slot, kTile));
    }
    finish_states();
    for (int slot = first; slot < end; slot += kTile) tile(slot, least(end - slot, kTile));
    store_rows();
  }

 private:
  int64_t row_index(int r) const {
    return (int64_t(b_) * p_.nodes + r / group_) * p_.heads_q + head_ * group_ + r % group_;
  }

  void load_rows() {
    for (int r = 0; r < rows_; ++r) {
      const T* q = static_cast<const T*>(p_.q) + b_ * p_.q_stride[0] + (r / group_) * p_.q_stride[1] +
                   (head_ * group_ + r % group_) * p_.q_stride[2];
      const T* g = static_cast<const T*>(params_.grad_out) + row_index(r) * dim_;
      const bool q_finite = load_row(q, s_.q + int64_t(r) * dim_, dim_);
      const bool g_finite = load_row(g, s_.grad_out + int64_t(r) * dim_, dim_);
      s_.broken[r] = !q_finite || !g_finite;
      s_.sums[r] = {A(-kInf), A(0), A(0)};
    }
    memset(s_.grad_q, 0, sizeof(A) * size_t(rows_) * size_t(dim_));
  }

  // The tile's keys and values; returns the slots whose key is finite.
  uint64_t load_tile(int slot, int count) {
    uint64_t finite = 0;
    for (int x = 0; x < kTile; ++x) {
      A* k = s_.k + x * dim_;
      bool good = x < count, v_good = good;
      if (x < count) {
        const int64_t at = slots::cache_row(p_, b_, slot + x);
        good = load_row(static_cast<const T*>(p_.k_cache) + slots::cache_offset(p_, p_.k_stride, at, head_),
                        k, dim_);
        v_good = load_row(static_cast<const T*>(p_.v_cache) + slots::cache_offset(p_, p_.v_stride, at, head_),
                          s_.row, dim_);
      }
      // Zeros, so that 0 * NaN cannot arise in the products.
      if (!good) memset(k, 0, sizeof(A) * size_t(dim_));
      if (!v_good) memset(s_.row, 0, sizeof(A) * size_t(dim_));
      for (int d = 0; d < dim_; ++d) s_.k_columns[d * kTile + x] = k[d];
      for (int d = 0; d < dim_; ++d) s_.v_columns[d * kTile + x] = s_.row[d];
      if (good) finite |= uint64_t(1) << x;
    }
    return finite;
  }

  // Returns whether any row sees any slot of the tile.
  bool see(int slot) {
    uint64_t any = 0;
    for (int i = 0; i < nodes_; ++i) {
      const uint64_t visible = slots::visible(p_, b_, length_, i, slot);
      for (int g = 0; g < group_; ++g) s_.visible[i * group_ + g] = visible;
      any |= visible;
    }
    return any != 0;
  }

  // scores = q k^T and gradients = grad_out v^T, for the rows from `first` on.
  void multiply_rows(int first, int count) {
    const A *q = s_.q + int64_t(first) * dim_, *grad_out = s_.grad_out + int64_t(first) * dim_;
    memset(s_.scores, 0, sizeof(A) * kTile * size_t(count));
    memset(s_.gradients, 0, sizeof(A) * kTile * size_t(count));
    multiply<A>(s_.scores, kTile, {q, dim_, 1}, s_.k_columns, kTile, count, kTile, dim_);
    multiply<A>(s_.gradients, kTile, {grad_out, dim_, 1}, s_.v_columns, kTile, count, kTile, dim_);
  }

  void accumulate(int slot, int count) {
    if (!see(slot)) return;
    const uint64_t finite = load_tile(slot, count);
    for (int first = 0; first < rows_; first += kTile) {
      const int rows = least(rows_ - first, kTile);
      multiply_rows(first, rows);
      for (int i = 0; i < rows; ++i) {
        const uint64_t visible = s_.visible[first + i] & finite;
        accumulate_row(p_, s_.sums[first + i], visible, s_.scores + i * kTile, s_.gradients + i * kTile);
      }
    }
  }

  void finish_states() {
    for (int r = 0; r < rows_; ++r) {
      const float forward_lse = p_.lse[row_index(r)];
      const RowSums<A>& sums = s_.sums[r];
      const T* out = static_cast<const T*>(p_.out) + row_index(r) * dim_;
      A* grad_out = s_.grad_out + int64_t(r) * dim_;
      A delta = 0;
      for (int d = 0; d < dim_; ++d) delta += grad_out[d] * A(element(out[d]));
      const bool is_finite = delta - delta == A(0);

      const double lse =
          kOwnSums ? double(sums.top) + __builtin_log(double(sums.weights)) : double(forward_lse);
      A weight = 1;
      if (p_.sinks)
        weight = A(1.0 / (1.0 + __builtin_exp(double(p_.sinks[head_ * group_ + r % group_]) - lse)));
      if (kOwnSums) delta = weight * sums.products / sums.weights;
      const A shift = (params_.grad_lse ? A(params_.grad_lse[row_index(r)]) : A(0)) - weight * delta;

      const bool saw_nothing = forward_lse == -kInf;
      s_.broken[r] = !saw_nothing && (s_.broken[r] || !is_finite || shift - shift != A(0) ||
                                      lse - lse != 0.0 || forward_lse - forward_lse != 0.0f);
      s_.state[r] = {kOwnSums ? sums.top : A(forward_lse), kOwnSums ? A(1) / sums.weights : A(1), weight,
                     shift};
      if (saw_nothing || s_.broken[r]) {  // no part in any product
        s_.state[r] = {A(0), A(0), A(0), A(0)};
        memset(grad_out, 0, sizeof(A) * size_t(dim_));
        memset(s_.q + int64_t(r) * dim_, 0, sizeof(A) * size_t(dim_));
      }
    }
  }

  void tile(int slot, int count) {
    if (!see(slot)) return;
    const uint64_t finite = load_tile(slot, count);
    const bool caches = params_.grad_k != nullptr;
    memset(s_.grad_k, 0, sizeof(A) * kTile * size_t(dim_));
    memset(s_.grad_v, 0, sizeof(A) * kTile * size_t(dim_));
    uint64_t touched = 0, broken = 0;  // slots that some row sees; that some broken row sees
    for (int first = 0; first < rows_; first += kTile) {
      const int rows = least(rows_ - first, kTile);
      const A *q = s_.q + int64_t(first) * dim_, *grad_out = s_.grad_out + int64_t(first) * dim_;
      multiply_rows(first, rows);
      for (int i = 0; i < rows; ++i) {
        const uint64_t visible = s_.visible[first + i];
        touched |= visible;
        if (s_.broken[first + i]) broken |= visible;
        differentiate_row(p_, s_.state[first + i], visible & finite, s_.scores + i * kTile,
                          s_.gradients + i * kTile);
      }
      if (params_.grad_q) {
        multiply<A>(s_.grad_q + int64_t(first) * dim_, dim_, {s_.gradients, kTile, 1}, s_.k, dim_, rows, dim_,
                    kTile);
      }
      if (caches) {
        multiply<A>(s_.grad_v, dim_, {s_.scores, 1, kTile}, grad_out, dim_, kTile, dim_, rows);
        multiply<A>(s_.grad_k, dim_, {s_.gradients, 1, kTile}, q, dim_, kTile, dim_, rows);
      }
    }
    if (!caches) return;
    const A scale = __is_same(A, double) ? A(p_.scale_f64) : A(p_.scale);
    for (int x = 0; x < count; ++x) {
      if (!(touched >> x & 1)) continue;
      const int64_t at = (slots::cache_row(p_, b_, slot + x) * p_.heads_kv + head_) * dim_;
      const bool is_broken = broken >> x & 1;
      add(static_cast<T*>(params_.grad_k) + at, s_.grad_k + x * dim_, scale, is_broken);
      add(static_cast<T*>(params_.grad_v) + at, s_.grad_v + x * dim_, A(1), is_broken);
    }
  }

  void add(T* to, const A* values, A scale, bool is_broken) const {
    for (int d = 0; d < dim_; ++d) {
      to[d] = rounded<T>(A(element(to[d])) + (is_broken ? A(__builtin_nan("")) : scale * values[d]));
    }
  }

  void store_rows() const {
    if (!params_.grad_q) return;
    const A scale = __is_same(A, double) ? A(p_.scale_f64) : A(p_.scale);
    for (int r = 0; r < rows_; ++r) {
      T* to = static_cast<T*>(params_.grad_q) + row_index(r) * dim_;
      const A* from = s_.grad_q + int64_t(r) * dim_;
      for (int d = 0; d < dim_; ++d)
        to[d] = rounded<T>(s_.broken[r] ? A(__builtin_nan("")) : scale * from[d]);
    }
  }

  const TreeAttentionParams& p_;
  const TreeAttentionBackwardParams& params_;
  Scratch<A> s_;
  int group_, dim_;
  int b_ = 0, head_ = 0, nodes_ = 0, length_ = 0, rows_ = 0;
};

// Zeros for rows past n_nodes and for slots that nobody sees.
template <class T>
void clear(const TreeAttentionBackwardParams& params) {
  const TreeAttentionParams& p = params.forward;
  const auto zero = [](void* memory, int64_t pieces, int64_t elements) {
    if (memory == nullptr) return;
    parallel_for(pieces, [&](int64_t i) {
      memset(static_cast<T*>(memory) + i * elements, 0, sizeof(T) * size_t(elements));
    });
  };
  zero(params.grad_q, p.batch, int64_t(p.nodes) * p.heads_q * p.head_dim);
  zero(params.grad_k, p.num_pages, int64_t(p.page_size) * p.heads_kv * p.head_dim);
  zero(params.grad_v, p.num_pages, int64_t(p.page_size) * p.heads_kv * p.head_dim);
}

template <class T, class A>
void run(const TreeAttentionBackwardParams& params) {
  const TreeAttentionParams& p = params.forward;
  clear<T>(params);
  const int64_t stride = Scratch<A>(p, nullptr).bytes, tasks = tasks_of(p);
  int64_t next = 0;
  parallel_for(workers_of(p), [&](int64_t w) {
    Backward<T, A> backward(params, static_cast<char*>(params.workspace) + w * stride);
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) break;
      const int head = int(task % p.heads_kv);
      if (!p.block_table) {
        backward.sequence(int(task / p.heads_kv), head);
        continue;
      }
      for (int b = 0; b < p.batch; ++b) backward.sequence(b, head);
    }
  });
}

}  // namespace

size_t tree_attention_backward_workspace(const TreeAttentionBackwardParams& params) {
  const TreeAttentionParams& p = params.forward;
  const bool f64 = p.q_type == DType::f64;
  const int64_t bytes = f64 ? Scratch<double>(p, nullptr).bytes : Scratch<float>(p, nullptr).bytes;
  return size_t(workers_of(p) * bytes);
}

void tree_attention_backward(const TreeAttentionBackwardParams& params) {
  with_type<double, float, half, bf16>("tree_attention_backward", params.forward.q_type, [&](auto t) {
    using T = decltype(t);
    run<T, typename compute_type<T>::type>(params);
  });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, tree_attention_backward_workspace, TreeAttentionBackwardParams)
TRANCHE_CPU_ENTRY(void, tree_attention_backward, TreeAttentionBackwardParams)
