// Softmax attention between the pixels of an image on the CPU, by the product of the family's convolutions.
//
// A task is some queries of one image and head. It puts all keys into panels [d][32 keys] and all values into
// panels [keys][32 channels], and takes queries in blocks whose scores stay in the second-level cache: scores
// for panels of keys, softmax of each query's row, and the rows times the values. All is float, or double; a
// query's numbers come in the order of the keys, whatever the blocks.
#pragma once

#include "core/tasks.h"
#include "pconv/partial_attention.h"
#include "pconv/product_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int64_t kSegment = 8;  // keys whose weights are one segment of the second product

// kWidth elements as floats, of which the first `live` are there; the others are 0.
template <class T>
TRANCHE_INLINE Vec load_some(const T* from, int64_t live) {
#if defined(__AVX512F__)
  return live >= kWidth ? load16(from, kWidth) : load16(from, int(most<int64_t>(live, 0)));
#else
  float values[kWidth] = {};
  row_to_float(from, values, int(most<int64_t>(0, least<int64_t>(live, kWidth))));
  return vload(values);
#endif
}

TRANCHE_INLINE float largest_lane(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float lanes[kWidth];
  vstore(lanes, x);
  for (int i = 1; i < kWidth; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
#endif
}

TRANCHE_INLINE float sum_of_lanes(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float lanes[kWidth];
  vstore(lanes, x);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}

// s = factor * scores + bias becomes exp(s - the largest), and 0 beyond n keys up to whole segments; returns
// the sum. Scores lie in panels, `step` apart.
template <class T>
TRANCHE_INLINE float softmax_row(float* scores, int64_t step, int64_t n, const T* bias, float factor) {
  constexpr float kLog2e = 1.44269504088896341f;
  const Vec scale = vset(factor), nothing = vset(-kInf);
  const int64_t end = round_up(n, most<int64_t>(kSegment, kWidth));
  const auto at = [&](int64_t i) { return scores + i / kPanel * step + i % kPanel; };
  Vec top = nothing;
  for (int64_t i = 0; i < end; i += kWidth) {
    const int64_t live = n - i;
    Vec s = vfma(vload(at(i)), scale, load_some(bias + i, live));
    if (live < kWidth) s = vselect(mask_of_bits((1u << most<int64_t>(live, 0)) - 1u), s, nothing);
    vstore(at(i), s);
    top = vmax(s, top);  // NaN is passed by: it comes back below
  }
  const Vec base = vset(largest_lane(top));
  Vec sums = vset(0.0f);
  for (int64_t i = 0; i < end; i += kWidth) {
    // not sooner by log2 e: what hides a key may be the lowest number there is
    const Vec e = vexp2<6>(vmul(vsub(vload(at(i)), base), vset(kLog2e)));
    vstore(at(i), e);
    sums = vadd(sums, e);
  }
  return sum_of_lanes(sums);
}

TRANCHE_INLINE double softmax_row(double* scores, int64_t step, int64_t n, const double* bias,
                                  double factor) {
  const auto at = [&](int64_t i) -> double& { return scores[i / kPanel * step + i % kPanel]; };
  double top = -__builtin_inf(), sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    at(i) = at(i) * factor + bias[i];
    top = at(i) > top ? at(i) : top;
  }
  for (int64_t i = 0; i < n; ++i) {
    at(i) = __builtin_exp(at(i) - top);
    sum += at(i);
  }
  for (int64_t i = n; i < round_up(n, kSegment); ++i) at(i) = 0.0;
  return sum;
}

template <class T>
class Mix {
  using A = typename compute_type<T>::type;
  using K = typename KindOf<A>::type;
  static constexpr bool kInPlace = __is_same(T, A);  // queries are read where they lie

 public:
  Mix(const PartialAttentionParams& p, void* memory)
      : p_(p),
        n_(p.channels - p.start),
        step_(3 * n_),
        dim_(n_ / p.heads),
        keys_(p.height * p.width),
        segments_((keys_ + kSegment - 1) / kSegment),
        arena_(memory) {
    constexpr int64_t kWorthThreads = 1 << 18;  // multiplications
    constexpr int64_t kScoreBytes = 128 << 10;  // of a block
    constexpr int64_t kFew = 14, kMany = 112;   // queries of a block
    const int64_t heads = int64_t(p.batch) * p.heads, threads = num_threads();
    const bool shared = heads * keys_ * keys_ * dim_ * 2 >= kWorthThreads;
    const int64_t wanted = shared ? (threads + heads - 1) / heads : 1;
    task_queries_ = most(least(keys_, kFew), (keys_ + wanted - 1) / wanted);
    parts_ = (keys_ + task_queries_ - 1) / task_queries_;
    slots_ = shared ? least(threads, heads * parts_) : 1;
    const int64_t fitting = kScoreBytes / (panels(keys_) * kPanel * int64_t(sizeof(A))) / kFew * kFew;
    block_ = least(task_queries_, most(kFew, least(kMany, fitting)));

    offsets_ = arena_.template take<int64_t>(segments_);
    zeros_ = arena_.template take<A>(kPanel);
    Arena one(nullptr);
    take_scratch(one);
    scratch_bytes_ = one.used();
    scratch_ = arena_.template take<char>(slots_ * scratch_bytes_);
  }

  size_t bytes() const { return size_t(arena_.used()); }

  void run() const {
    for (int64_t s = 0; s < segments_; ++s) {
      const int64_t key = s * kSegment;
      offsets_[s] = key / kPanel * score_step() + key % kPanel;
    }
    for (int64_t i = 0; i < kPanel; ++i) zeros_[i] = A(0);
    const int64_t tasks = int64_t(p_.batch) * p_.heads * parts_;
    if (slots_ > 1) {
      parallel_tasks(tasks, slots_, [&](int64_t task, int64_t slot) { attend(task, slot); });
    } else {
      for (int64_t task = 0; task < tasks; ++task) attend(task, 0);
    }
  }

 private:
  struct Scratch {
    A* keys;     // [panels of keys][d][kPanel]
    A* values;   // [panels of channels][keys][kPanel], keys a multiple of kSegment
    A* scores;   // [panels of keys][block][kPanel]
    A* scale;    // [block] one over the sum of a query's weights
    A* out;      // [block][kPanel]
    A* queries;  // [block][d], unless they are read in place
  };

  Scratch take_scratch(Arena& arena) const {
    const int64_t key_panels = panels(keys_);
    return {arena.template take<A>(key_panels * dim_ * kPanel),
            arena.template take<A>(panels(dim_) * segments_ * kSegment * kPanel),
            arena.template take<A>(key_panels * score_step()),
            arena.template take<A>(block_),
            arena.template take<A>(block_ * kPanel),
            arena.template take<A>(kInPlace ? 0 : block_ * dim_)};
  }

  int64_t score_step() const { return block_ * kPanel; }

  void attend(int64_t task, int64_t slot) const {
    Arena arena(scratch_ + slot * scratch_bytes_);
    const Scratch own = take_scratch(arena);
    const int64_t part = task % parts_, head = task / parts_ % p_.heads, image = task / parts_ / p_.heads;
    const T* q = static_cast<const T*>(p_.products) + image * keys_ * step_ + head * dim_;
    prepare_keys(q + n_, own.keys);
    prepare_values(q + 2 * n_, own.values);
    const int64_t end = least(keys_, (part + 1) * task_queries_);
    for (int64_t first = part * task_queries_; first < end; first += block_) {
      const int64_t queries = least(block_, end - first);
      score(q + first * step_, queries, own);
      const A factor = A(1) / A(__builtin_sqrt(double(dim_)));
      const T* bias = static_cast<const T*>(p_.bias) + (head * keys_ + first) * keys_;
      for (int64_t i = 0; i < queries; ++i) {
        const A sum = softmax_row(own.scores + i * kPanel, score_step(), keys_, bias + i * keys_, factor);
        own.scale[i] = A(1) / sum;
      }
      mix(queries, static_cast<T*>(p_.pixels) + (image * keys_ + first) * n_ + head * dim_, own);
    }
  }

  // Lanes are keys.
  void prepare_keys(const T* k, A* panel) const {
    for (int64_t first = 0; first < keys_; first += kPanel, panel += dim_ * kPanel) {
      const int64_t live = least(kPanel, keys_ - first);
      if (live < kPanel) memset(panel, 0, size_t(dim_ * kPanel) * sizeof(A));
      load_pixels(Pixels<const T>{k + first * step_, step_, 1}, dim_, live, panel, kPanel);
    }
  }

  // Lanes are channels; the keys that fill the last segment are zeros.
  void prepare_values(const T* v, A* panel) const {
    const int64_t rows = segments_ * kSegment;
    for (int64_t first = 0; first < dim_; first += kPanel, panel += rows * kPanel) {
      const int64_t live = least(kPanel, dim_ - first), from = live < kPanel ? 0 : keys_;
      memset(panel + from * kPanel, 0, size_t((rows - from) * kPanel) * sizeof(A));
      load_pixels(Pixels<const T>{v + first, 1, step_}, keys_, live, panel, kPanel);
    }
  }

  void score(const T* q, int64_t queries, const Scratch& own) const {
    const int64_t offset = 0;
    Product<K> a{};
    if constexpr (kInPlace) {
      a.x = q;
      a.step = step_;
    } else {
      for (int64_t i = 0; i < queries; ++i) load_row(q + i * step_, own.queries + i * dim_, dim_);
      a.x = own.queries;
      a.step = dim_;
    }
    a.offset = &offset;
    a.segments = 1;
    a.depth = dim_;
    a.bias = zeros_;
    a.runs = 1;
    a.pixels = queries;
    for (int64_t panel = 0; panel < panels(keys_); ++panel) {
      a.w = own.keys + panel * dim_ * kPanel;
      a.out = own.scores + panel * score_step();
      product(a, least(kPanel, keys_ - panel * kPanel));
    }
  }

  void mix(int64_t queries, T* to, const Scratch& own) const {
    Product<K> a{};
    a.x = own.scores;
    a.step = kPanel;
    a.offset = offsets_;
    a.segments = segments_;
    a.depth = kSegment;
    a.bias = zeros_;
    a.out = own.out;
    a.runs = 1;
    a.pixels = queries;
    for (int64_t panel = 0; panel < panels(dim_); ++panel) {
      const int64_t first = panel * kPanel, live = least(kPanel, dim_ - first);
      a.w = own.values + panel * segments_ * kSegment * kPanel;
      product(a, live);
      for (int64_t i = 0; i < queries; ++i) {
        A* row = own.out + i * kPanel;
        const A scale = own.scale[i];
        for (int64_t c = 0; c < kPanel; ++c) row[c] *= scale;
        store_row(row, to + i * n_ + first, live);
      }
    }
  }

  const PartialAttentionParams& p_;
  const int64_t n_, step_, dim_, keys_, segments_;
  Arena arena_;
  int64_t task_queries_ = 1, parts_ = 1, slots_ = 1, block_ = 1, scratch_bytes_ = 0;
  int64_t* offsets_ = nullptr;
  A* zeros_ = nullptr;
  char* scratch_ = nullptr;
};

}  // namespace tranche::cpu::TRANCHE_ISA
