// conv2d_slice_weight_grad on the CPU.
//
// All output rows of all images, one after the other, are cut into chunks whose places depend on the call's
// shapes alone. A task is a chunk and some outputs of a group (or, a channel each, some channels): it packs
// the rows it needs pass by pass and adds up one partial gradient. Partial gradients are then added in the
// order of the chunks.
//
// x is packed as [rows][columns][channels of the group], zeros where the image ends, so that with dilation 1
// the taps of a kernel's row and their channels are neighbours: vector lanes run over both. In bf16 a unit is
// an element and the one that the next output row sees in its place, and d steps over pairs of output rows;
// what an odd last row sees follows once more, its second elements zero.
#include "pconv/conv2d_slice_weight_grad.h"

#include <cstring>

#include "core/dispatch.h"
#include "core/isa.h"
#include "core/tasks.h"
#include "pconv/outer_cpu.h"
#if defined(__AMX_BF16__)
#include "pconv/outer_amx_cpu.h"
#endif

namespace tranche::cpu::TRANCHE_ISA {

namespace {

constexpr int64_t kChunkPixels = 1024;  // at least, so that partial gradients are little beside the work
constexpr int64_t kMostChunks = 64;
constexpr int64_t kMostPartial = 16 << 20;  // sums of all partial gradients together, unless one has more
constexpr int64_t kPassUnits = 128 << 10;   // of x, that a second-level cache holds
constexpr int64_t kMostOutputs = 64;        // of a task
constexpr int64_t kMostLines = 4096;        // of the next chunk, asked for in advance
constexpr int64_t kOverrun = 64;            // elements that a last vector may touch beyond an array

TRANCHE_INLINE int64_t parts_of(int64_t all, int64_t part) { return (all + part - 1) / part; }

#if defined(__AVX512BF16__)
// to[i] = (low[i], high[i]), or (low[i], 0); whole vectors.
TRANCHE_INLINE void pair_up(const bf16* low, const bf16* high, uint32_t* to, int64_t n) {
  const auto wide = [](const bf16* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i second = high ? _mm512_slli_epi32(wide(high + i), 16) : _mm512_setzero_si512();
    _mm512_storeu_si512(to + i, _mm512_or_si512(wide(low + i), second));
  }
}
#endif

template <class T, class K>
class WeightGradient {
  using X = typename K::X;
  using A = typename K::A;
  using Unit = typename K::Unit;
  static constexpr int kLanes = K::kLanes;
#if defined(__AMX_BF16__)
  static constexpr bool kTiles = K::kPair == 2;
#else
  static constexpr bool kTiles = false;
#endif

 public:
  WeightGradient(const Conv2dSliceWeightGradParams& p, void* memory)
      : p_(p),
        depthwise_(is_depthwise(p)),
        taps_(int64_t(p.kernel[0]) * p.kernel[1]),
        group_in_(p.c_in / p.groups),
        group_out_(p.c_out / p.groups),
        pixel_(depthwise_ ? least<int64_t>(kMostOutputs, round_up(p.c_in, kLanes)) : group_in_),
        reach_{int64_t(p.kernel[0] - 1) * p.dilation[0] + 1, int64_t(p.kernel[1] - 1) * p.dilation[1] + 1},
        columns_((p.out_width - 1) * p.stride[1] + reach_[1]),
        row_units_(columns_ * pixel_),
        // with dilation 1 the taps of a row are one run of lanes
        run_taps_(!depthwise_ && p.dilation[1] == 1 ? p.kernel[1] : 1),
        run_(run_taps_ * group_in_),
        run_vectors_(parts_of(run_, kLanes)),
        vectors_(depthwise_ ? taps_ : taps_ / run_taps_ * run_vectors_),
        arena_(memory) {
    const int64_t rows = p.batch * p.out_height;
    const int64_t partial =
        depthwise_ ? parts_of(p.c_in, pixel_) * taps_ * pixel_ : int64_t(p.c_out) * vectors_ * kLanes;
    const int64_t most_chunks = most<int64_t>(1, least(kMostChunks, kMostPartial / partial));
    chunk_rows_ = round_up(most(parts_of(kChunkPixels, p.out_width), parts_of(rows, most_chunks)), K::kPair);
    chunks_ = parts_of(rows, chunk_rows_);
    pass_rows_ = least(chunk_rows_, round_up(most<int64_t>(1, kPassUnits / pixel_ / p.out_width), K::kPair));

    const int64_t threads = num_threads();
    outputs_ = depthwise_ ? pixel_ : least(kMostOutputs, group_out_);
    while (!depthwise_ && outputs_ > 16 &&
           chunks_ * p.groups * parts_of(group_out_, outputs_) < 2 * threads) {
      outputs_ = round_up(parts_of(outputs_, 2), 8);
    }
    parts_ = depthwise_ ? parts_of(p.c_in, pixel_) : p.groups * parts_of(group_out_, outputs_);
    slots_ = least(threads, chunks_ * parts_);

    vector_offsets_ = arena_.template take<int64_t>(vectors_);
    partial_size_ = partial;
    partials_ = arena_.template take<A>(chunks_ * partial + kOverrun);
    Arena counted(nullptr);
    scratch(counted);
    scratch_bytes_ = counted.used();
    scratch_ = arena_.template take<char>(slots_ * scratch_bytes_);
  }

  size_t bytes() const { return size_t(arena_.used()); }

  void run() const {
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t tap = depthwise_ ? v : v / run_vectors_ * run_taps_;
      const int64_t down = tap / p_.kernel[1] * p_.dilation[0], right = tap % p_.kernel[1] * p_.dilation[1];
      vector_offsets_[v] = down * row_units_ + right * pixel_ + (depthwise_ ? 0 : v % run_vectors_ * kLanes);
    }
    parallel_tasks(chunks_ * parts_, slots_, [&](int64_t task, int64_t slot) {
      Arena memory(scratch_ + slot * scratch_bytes_);
      const Scratch s = scratch(memory);
      // which chunk this worker takes next is a guess
      const int64_t index = task / parts_, next = (task + 1) / parts_;
      Lines ahead;
      if (next > index && next < chunks_ && !depthwise_)
        ahead = lines_of(next, part_of(task % parts_), s.lines);
      chunk(index, task % parts_, s, ahead);
    });
    parallel_for(depthwise_ ? parts_ : p_.c_out, [&](int64_t i) { merge(i); });
  }

 private:
  struct Scratch {
    Unit *x, *y;
    int64_t* offsets;
    X *rows, *line;  // in pairs: x and two rows of grad_y before they are paired up
    Unit* pairs;     // for tiles: grad_y before it is turned around
    const char** lines;
  };

  // The channels of a task: of x from `in` on, of grad_y from `out` on.
  struct Part {
    int64_t in, channels, out, outputs;
  };

  Scratch scratch(Arena& arena) const {
    const int64_t images = (pass_rows_ + p_.out_height - 2) / p_.out_height + 1;
    const int64_t rows = pass_rows_ * p_.stride[0] + images * reach_[0];
    const int64_t depth = most_depth(images);
    Scratch s;
    s.x = arena.template take<Unit>((rows + (K::kPair - 1) * images * reach_[0]) * row_units_ + kOverrun);
    s.y = arena.template take<Unit>((kTiles ? tile_step(depth) * round_up(outputs_, 16) : depth * outputs_) +
                                    kOverrun);
    s.offsets = arena.template take<int64_t>(depth);
    s.rows = s.line = nullptr;
    s.pairs = nullptr;
    if (K::kPair == 2) {
      s.rows = arena.template take<X>(rows * row_units_ + kOverrun);
      s.line = arena.template take<X>(2 * p_.out_width * outputs_ + kOverrun);
    }
    s.lines = arena.template take<const char*>(depthwise_ ? 0 : kMostLines);
    if (kTiles) s.pairs = arena.template take<Unit>(round_up(p_.out_width, 16) * round_up(outputs_, 16));
    return s;
  }

  // Entries of d that a pass may have: pairs of rows do not cross from image to image.
  int64_t most_depth(int64_t images) const {
    return (K::kPair == 1 ? pass_rows_ : pass_rows_ / 2 + images) * p_.out_width;
  }
  static int64_t tile_step(int64_t depth) { return round_up(depth, 16) + 16; }

  Part part_of(int64_t index) const {
    if (depthwise_) {
      const int64_t first = index * pixel_, live = least(pixel_, p_.c_in - first);
      return {first, live, first, live};
    }
    const int64_t blocks = parts_of(group_out_, outputs_), g = index / blocks;
    const int64_t first = index % blocks * outputs_;
    return {g * group_in_, group_in_, g * group_out_ + first, least(outputs_, group_out_ - first)};
  }

  // Where in memory the rows of a chunk lie, as far as pixels' channels or rows of planes are dense.
  Lines lines_of(int64_t index, const Part& part, const char** lines) const {
    const int64_t begin = index * chunk_rows_, end = least(begin + chunk_rows_, p_.batch * p_.out_height);
    int64_t count = 0;
    const auto add = [&](const T* row, const int64_t (&stride)[4], int64_t channels, int64_t width) {
      const bool last = stride[1] == 1;
      if (!last && stride[3] != 1) return;
      const int64_t runs = last ? width : channels, step = last ? stride[3] : stride[1];
      const int64_t run = last ? channels : width;
      for (int64_t i = 0; i < runs; ++i) {
        const char* from = reinterpret_cast<const char*>(row + i * step);
        const char* stop = reinterpret_cast<const char*>(row + i * step + run);
        for (; from < stop && count < kMostLines; from += 64) lines[count++] = from;
      }
    };
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / p_.out_height, i = r % p_.out_height;
      const int64_t y =
          most<int64_t>(0, least(p_.height - 1, i * p_.stride[0] - p_.padding[0] + reach_[0] - 1));
      add(static_cast<const T*>(p_.grad_y) + b * p_.y_stride[0] + part.out * p_.y_stride[1] +
              i * p_.y_stride[2],
          p_.y_stride, part.outputs, p_.out_width);
      add(static_cast<const T*>(p_.x) + b * p_.x_stride[0] + (p_.start + part.in) * p_.x_stride[1] +
              y * p_.x_stride[2],
          p_.x_stride, part.channels, p_.width);
    }
    return {lines, lines + count};
  }

  void chunk(int64_t index, int64_t part_index, const Scratch& s, Lines ahead) const {
    const Part part = part_of(part_index);
    const int64_t begin = index * chunk_rows_, end = least(begin + chunk_rows_, p_.batch * p_.out_height);
    Outer<K> a{};
    a.x = s.x;
    a.offset = s.offsets;
    a.vector = vector_offsets_;
    a.y = s.y;
    a.rows = part.outputs;
    a.vectors = vectors_;
    a.ahead = &ahead;
    a.sums = partials_ + index * partial_size_ +
             (depthwise_ ? part_index * taps_ * pixel_ : part.out * vectors_ * kLanes);
    for (int64_t first = begin; first < end; first += pass_rows_) {
      const int64_t last = least(first + pass_rows_, end);
      a.begins = first == begin;
      if constexpr (kTiles) {
#if defined(__AMX_BF16__)
        a.y_step = tile_step(most_depth((pass_rows_ + p_.out_height - 2) / p_.out_height + 1));
        a.depth = pack(first, last, part, a.y_step, s);
        tile_outer(a, TileRuns(p_.out_width, p_.stride[1] * pixel_));
#endif
      } else {
        a.y_step = depthwise_ ? pixel_ : part.outputs;
        a.depth = pack(first, last, part, a.y_step, s);
        if (!depthwise_) {
          outer(a);
        } else if constexpr (K::kPair == 1) {
          depthwise_outer(a);
        }
      }
    }
  }

  // Output rows [begin, end) of all images' and what they see of x. Returns the entries of d.
  int64_t pack(int64_t begin, int64_t end, const Part& part, int64_t y_step, const Scratch& s) const {
    Unit* x = s.x;
    int64_t depth = 0;
    while (begin < end) {
      const int64_t b = begin / p_.out_height, top = begin % p_.out_height;
      const int64_t rows = least(end - begin, p_.out_height - top);
      const int64_t pairs = rows / K::kPair * K::kPair;  // in output rows
      const int64_t step = p_.stride[0], first = top * step - p_.padding[0];
      const int64_t seen = pairs > 0 ? (pairs - K::kPair) * step + reach_[0] : 0;
      for (int64_t r = 0; r < rows; r += K::kPair) {
        pack_y(b, top + r, r < pairs, part, y_step, depth, s);
        const int64_t at = x - s.x + (r < pairs ? r * step : seen) * row_units_;
        for (int64_t j = 0; j < p_.out_width; ++j) s.offsets[depth++] = at + j * p_.stride[1] * pixel_;
      }
      if constexpr (K::kPair == 1) {
        for (int64_t r = 0; r < seen; ++r) pack_row(b, first + r, part, x + r * row_units_);
        x += seen * row_units_;
      } else {
#if defined(__AVX512BF16__)
        for (int64_t r = 0; r < (rows - 1) * step + reach_[0]; ++r) {
          pack_row(b, first + r, part, s.rows + r * row_units_);
        }
        pair_up(s.rows, s.rows + step * row_units_, x, seen * row_units_);
        x += seen * row_units_;
        if (pairs < rows) {
          pair_up(s.rows + pairs * step * row_units_, nullptr, x, reach_[0] * row_units_);
          x += reach_[0] * row_units_;
        }
#endif
      }
      begin += rows;
    }
    return depth;
  }

  // Row y of image b of x.
  void pack_row(int64_t b, int64_t y, const Part& part, X* row) const {
    if (y < 0 || y >= p_.height) {
      memset(row, 0, size_t(row_units_) * sizeof(X));
      return;
    }
    const int64_t *xs = p_.x_stride, left = least<int64_t>(columns_, p_.padding[1]);
    const int64_t inside = least(columns_ - left, p_.width), right = columns_ - left - inside;
    memset(row, 0, size_t(left * pixel_) * sizeof(X));
    memset(row + (left + inside) * pixel_, 0, size_t(right * pixel_) * sizeof(X));
    const T* x = static_cast<const T*>(p_.x) + b * xs[0] + (p_.start + part.in) * xs[1] + y * xs[2];
    load_pixels(Pixels<const T>{x, xs[1], xs[3]}, inside, part.channels, row + left * pixel_, pixel_);
  }

  // Output row i, and in pairs the next if there is one, as entries of d from `depth` on.
  void pack_y(int64_t b, int64_t i, [[maybe_unused]] bool two, const Part& part, int64_t step, int64_t depth,
              const Scratch& s) const {
    const int64_t *ys = p_.y_stride, width = p_.out_width;
    const T* y = static_cast<const T*>(p_.grad_y) + b * ys[0] + part.out * ys[1] + i * ys[2];
    if constexpr (K::kPair == 1) {
      load_pixels(Pixels<const T>{y, ys[1], ys[3]}, width, part.outputs, s.y + depth * step, step);
    } else {
#if defined(__AVX512BF16__)
      const int64_t outputs = part.outputs, size = width * outputs;
      for (int r = 0; r < (two ? 2 : 1); ++r) {
        load_pixels(Pixels<const T>{y + r * ys[2], ys[1], ys[3]}, width, outputs, s.line + r * size, outputs);
      }
      const X* second = two ? s.line + size : nullptr;
      if constexpr (!kTiles) {
        pair_up(s.line, second, s.y + depth * step, size);
      } else {
        pair_up(s.line, second, s.pairs, size);
        turn(s.pairs, width, outputs, s.y + depth, step);
      }
#endif
    }
  }

#if defined(__AVX512F__)
  // to[o * step + i] = from[i * outputs + o]; rows of `to` are written in whole vectors.
  static void turn(const uint32_t* from, int64_t entries, int64_t outputs, uint32_t* to, int64_t step) {
    for (int64_t i = 0; i < entries; i += 16) {
      for (int64_t o = 0; o < outputs; o += 16) {
        __m512i block[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          block[r] =
              i + r < entries ? _mm512_loadu_si512(from + (i + r) * outputs + o) : _mm512_setzero_si512();
        }
        transpose16(block);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(to + (o + r) * step + i, block[r]);
      }
    }
  }
#endif

  // One output's gradient (of a channel each: some channels'), of all chunks.
  void merge(int64_t i) const {
    const int64_t size = depthwise_ ? taps_ * pixel_ : vectors_ * kLanes;
    A* sums = partials_ + i * size;
    for (int64_t c = 1; c < chunks_; ++c) {
      const A* more = sums + c * partial_size_;
      for (int64_t k = 0; k < size; ++k) sums[k] += more[k];
    }
    T* to = static_cast<T*>(p_.grad_weight) + i * (depthwise_ ? pixel_ : group_in_) * taps_;
    const int64_t live = depthwise_ ? least(pixel_, p_.c_in - i * pixel_) : group_in_;
    // Taps that follow one another at a fixed distance go together.
    const bool even = depthwise_ || run_ % kLanes == 0;
    const int64_t together = even ? taps_ : run_taps_;
    for (int64_t tap = 0; tap < taps_; tap += together) {
      store_pixels(sums + tap / run_taps_ * run_vectors_ * kLanes, depthwise_ ? pixel_ : group_in_, together,
                   live, Pixels<T>{to + tap, taps_, 1});
    }
  }

  const Conv2dSliceWeightGradParams& p_;
  const bool depthwise_;
  const int64_t taps_, group_in_, group_out_;
  const int64_t pixel_;  // units of a packed pixel
  const int64_t reach_[2];
  const int64_t columns_, row_units_;
  const int64_t run_taps_, run_, run_vectors_, vectors_;
  Arena arena_;
  int64_t chunk_rows_ = 1, chunks_ = 1, pass_rows_ = 1, outputs_ = 1, parts_ = 1, slots_ = 1;
  int64_t partial_size_ = 0, scratch_bytes_ = 0;
  int64_t* vector_offsets_ = nullptr;
  A* partials_ = nullptr;
  char* scratch_ = nullptr;
};

// f(gradient) with the arithmetic that serves p.
template <class F>
auto with_gradient(const Conv2dSliceWeightGradParams& p, void* memory, const F& f) {
  return with_type<double, float, half, bf16>("conv2d_slice_weight_grad", p.type, [&](auto t) {
    using T = decltype(t);
    using Kind = typename KindOf<T>::type;
    if constexpr (Kind::kPair > 1) {
      if (is_depthwise(p)) return f(WeightGradient<T, F32>(p, memory));
    }
    return f(WeightGradient<T, Kind>(p, memory));
  });
}

}  // namespace

size_t conv2d_slice_weight_grad_workspace(const Conv2dSliceWeightGradParams& p) {
  return with_gradient(p, nullptr, [](const auto& gradient) { return gradient.bytes(); });
}

void conv2d_slice_weight_grad(const Conv2dSliceWeightGradParams& p) {
  with_gradient(p, p.workspace, [](const auto& gradient) { gradient.run(); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, conv2d_slice_weight_grad_workspace, Conv2dSliceWeightGradParams)
TRANCHE_CPU_ENTRY(void, conv2d_slice_weight_grad, Conv2dSliceWeightGradParams)
