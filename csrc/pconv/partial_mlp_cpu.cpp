// partial_mlp on the CPU: some rows of an image go through the whole block while they are in the cache. Where
// all pixels are no more than that and weights are many, threads share the outputs of a layer instead: each
// weight is read by one of them, once.
#include <cstring>
#include <initializer_list>

#include "core/dispatch.h"
#include "core/isa.h"
#include "pconv/lanes_cpu.h"
#include "pconv/partial_mlp_vectors_cpu.h"
#if defined(__AMX_BF16__)
#include "pconv/partial_mlp_tiles_cpu.h"
#endif

namespace tranche::cpu::TRANCHE_ISA {

namespace {

// y = sums (the first `scaled` times `scale`) + b2 (+ x), for n channels of a pixel that lie side by side.
// x is null without a residual; sums and b2 may be read up to a multiple of 16.
template <class T, class A>
TRANCHE_INLINE void finish_pixel(const A* sums, const A* b2, const T* x, T* y, int64_t n, int64_t scaled,
                                 A scale) {
#if defined(__AVX512F__)
  if constexpr (!__is_same(A, double)) {
    for (int64_t c = 0; c < n; c += 16) {
      const int64_t gated = most<int64_t>(0, least<int64_t>(16, scaled - c));
      const Vec sum = vload(sums + c);
      Vec out = _mm512_mask_mul_ps(sum, __mmask16((1u << gated) - 1u), sum, vset(scale));
      out = vadd(out, vload(b2 + c));
      if (x) out = vadd(out, load16(x + c, int(least<int64_t>(16, n - c))));
      store_lanes(y + c, out, n - c);
    }
    return;
  }
#endif
  for (int64_t c = 0; c < n; ++c) {
    A out = c < scaled ? sums[c] * scale : sums[c];
    out = out + b2[c];
    y[c] = narrow<T>(x ? out + widen<A>(x[c]) : out);
  }
}

template <class T, class Math>
class PartialMlp {
  using A = typename Math::A;
  using Unit = typename Math::Unit;
  using Rows = typename Math::Rows;
  using Layer = typename Math::Layer;

 public:
  PartialMlp(const PartialMlpParams& p, void* memory)
      : p_(p),
        conv_params_(convolution_of(p)),
        conv_(conv_params_),
        first_(p.hidden, p.channels),
        second_(p.channels, p.hidden),
        arena_(memory) {
    // A tile is some rows of an image, or several small images: so many pixels that weights are worth
    // reading, and no more than the second-level cache can hold of u and h.
    constexpr int64_t kMostPixels = 224, kTileBytes = 2 << 20;
    const int64_t threads = num_threads(), image = p.height * p.width;
    const int64_t pixel_bytes = first_.pixel_bytes() + second_.pixel_bytes();
    const int64_t pixels = least(kMostPixels, most<int64_t>(1, kTileBytes / pixel_bytes));
    by_layer_ = p.batch * image <= least(pixels, int64_t(p.hidden) * p.channels / kWeightsOfPixel);
    const int64_t wanted = (threads + p.batch - 1) / p.batch;  // tiles of an image, or a multiple of that
    const int64_t most_rows = least(conv_.pass_rows(), most<int64_t>(1, pixels / p.width));
    const int64_t tiles = round_up((p.height + most_rows - 1) / most_rows, wanted);
    tile_rows_ = (p.height + tiles - 1) / tiles;
    tile_images_ = tile_rows_ < p.height ? 1 : most<int64_t>(1, least(pixels / image, p.batch / threads));
    if (tile_images_ > 1) {  // as many to each thread
      const int64_t groups = round_up((p.batch + tile_images_ - 1) / tile_images_, threads);
      tile_images_ = (p.batch + groups - 1) / groups;
    }
    if (by_layer_) tile_rows_ = p.height, tile_images_ = p.batch;
    tiles_ = (p.height + tile_rows_ - 1) / tile_rows_;
    tasks_ = (p.batch + tile_images_ - 1) / tile_images_ * tiles_;
    slots_ = by_layer_ ? threads : least(threads, tasks_);
    Arena packed(p.packed), &weights = p.packed ? packed : arena_;
    conv_.take_weights(weights);
    first_.take_weights(weights);
    second_.take_weights(weights);
    b2_ = weights.template take<A>(panels(p.channels) * kPanel);
    packed_bytes_ = weights.used();
    conv_.take(arena_);
    first_.take(arena_);
    second_.take(arena_);
    gates_ = arena_.template take<A>(p.gate ? p.batch * kept() : 0);
    spatial_ = arena_.template take<A>(p.spatial_weight ? p.hidden : 0);
    packers_ = least(threads, panels(p.hidden) + panels(p.channels));
    pack_scratch_units_ = most(first_.scratch_units(), second_.scratch_units());
    pack_scratch_ = arena_.template take<Unit>(packers_ * pack_scratch_units_);
    scratch_bytes_ = Scratch(*this, nullptr).bytes;
    scratch_ = arena_.template take<char>(slots_ * scratch_bytes_);
  }

  size_t bytes() const { return size_t(arena_.used()); }
  size_t packed_bytes() const { return size_t(packed_bytes_); }

  // The weights in the order of the products.
  void prepare_weights() const {
    conv_.prepare_weights();
    const int64_t count = panels(p_.hidden), all = count + panels(p_.channels);
    const auto pack = [&](int64_t i, int64_t slot) {
      Unit* scratch = pack_scratch_ + slot * pack_scratch_units_;
      if (i < count) {
        first_.pack(static_cast<const T*>(p_.w1), static_cast<const T*>(p_.b1), i, scratch);
      } else {
        second_.pack(static_cast<const T*>(p_.w2), static_cast<const T*>(nullptr), i - count, scratch);
      }
    };
    if (int64_t(p_.hidden) * p_.channels >= kWorthThreads) {
      parallel_tasks(all, packers_, pack);
    } else {
      for (int64_t i = 0; i < all; ++i) pack(i, 0);
    }
    widen_all(p_.b2, p_.channels, b2_);
    for (int64_t i = p_.channels; i < panels(p_.channels) * kPanel; ++i) b2_[i] = A(0);
  }

  void run() const {
    prepare();
    by_layer_ ? run_by_layer() : run_by_tile();
  }

 private:
  // Rows [row, row + rows) of images [b, b + images).
  struct Tile {
    int64_t b, images, row, rows;
  };

  Tile tile_at(int64_t task) const {
    Tile tile;
    tile.b = task / tiles_ * tile_images_;
    tile.images = least(tile_images_, p_.batch - tile.b);
    tile.row = task % tiles_ * tile_rows_;
    tile.rows = least(tile_rows_, p_.height - tile.row);
    return tile;
  }

  // A tile's memory in x or y, where its pixels are whole; otherwise nothing.
  Ahead memory_of(const Tile& tile, const void* tensor, const int64_t* stride, int64_t calls) const {
    if (tile.images <= 0 || stride[1] != 1 || stride[3] != p_.channels) return Ahead();
    const int64_t size = sizeof(T), row = p_.width * p_.channels * size;
    const T* first = static_cast<const T*>(tensor) + tile.b * stride[0] + tile.row * stride[2];
    return tile.images == 1 ? Ahead(first, tile.rows, stride[2] * size, row, calls)
                            : Ahead(first, tile.images, stride[0] * size, tile.rows * row, calls);
  }

  // What a thread works in.
  struct Scratch {
    Unit* packed;
    Rows u, h;
    A *sums, *residual, *scale;
    int64_t plane, bytes;
    Scratch(const PartialMlp& m, void* memory) {
      Arena arena(memory);
      const int64_t pixels = m.tile_images_ * m.tile_rows_ * m.p_.width;
      const int64_t rows = m.conv_.input_rows(m.tile_rows_);
      plane = m.conv_.plane_units(rows);
      packed = arena.take<Unit>(m.conv_.packed_units(rows));
      u.units = m.first_.row_units();
      h.units = m.second_.row_units();
      u.data = arena.take<Unit>(Rows::size(pixels, u.units));
      h.data = arena.take<Unit>(Rows::size(pixels, h.units));
      sums = arena.take<A>(most(round_up(pixels, 16) * kPanel, m.conv_.pass_sums()));
      residual = arena.take<A>(m.p_.width * kPanel);
      scale = arena.take<A>(pixels);
      bytes = arena.used();
    }
  };

  static constexpr int64_t kWorthThreads = 32768;  // weights of a layer

  int64_t kept() const { return p_.channels - p_.convolved; }

  static void widen_all(const void* from, int64_t n, A* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = widen<A>(static_cast<const T*>(from)[i]);
  }

  void prepare() const {
    if (!p_.packed) prepare_weights();
    conv_.prepare();
    first_.prepare();
    second_.prepare();
    if (p_.gate) widen_all(p_.gate, p_.batch * kept(), gates_);
    if (p_.spatial_weight) widen_all(p_.spatial_weight, p_.hidden, spatial_);
  }

  Scratch scratch(int64_t slot) const { return Scratch(*this, scratch_ + slot * scratch_bytes_); }

  // Memory is waited for while products are made: the first layer's ask for the tile's place in y, the
  // second's for the tile of x that this thread is likely to take next.
  void run_by_tile() const {
    parallel_tasks(tasks_, slots_, [&](int64_t task, int64_t slot) {
      const Tile tile = tile_at(task);
      const Scratch s = scratch(slot);
      const int64_t image_pixels = tile.rows * p_.width, pixels = tile.images * image_pixels;
      clear_beyond(pixels, s);
      for (int64_t i = 0; i < tile.images; ++i) {
        mix(tile.b + i, tile.row, tile.rows, i * image_pixels, s.u, s);
      }
      const typename Math::Session session;
      Ahead y = memory_of(tile, p_.y, p_.y_stride, first_.asks(pixels));
      for (int64_t panel = 0; panel < panels(p_.hidden); ++panel) hidden(pixels, panel, s, s.sums, &y);
      if (p_.spatial_weight) scores(0, pixels, s);
      Ahead x = memory_of(tile_at(task + 1), p_.x, p_.x_stride, second_.asks(pixels));
      for (int64_t panel = 0; panel < panels(p_.channels); ++panel) outputs(tile, panel, s, s, &x);
    });
  }

  // u and h of all pixels are the first worker's.
  void run_by_layer() const {
    const Scratch all = scratch(0);
    const Tile tile{0, p_.batch, 0, p_.height};
    const int64_t lines = p_.batch * p_.height, pixels = lines * p_.width;
    clear_beyond(pixels, all);
    const int64_t rows = (p_.height + slots_ - 1) / slots_, parts = (p_.height + rows - 1) / rows;
    parallel_tasks(p_.batch * parts, slots_, [&](int64_t task, int64_t slot) {
      const int64_t b = task / parts, row = task % parts * rows;
      const int64_t at = (b * p_.height + row) * p_.width;
      mix(b, row, least(rows, p_.height - row), at, all.u, scratch(slot));
    });
    parallel_shares(panels(p_.hidden), slots_, [&](int64_t begin, int64_t end, int64_t slot) {
      const typename Math::Session session;
      A* sums = scratch(slot).sums;
      for (int64_t panel = begin; panel < end; ++panel) hidden(pixels, panel, all, sums, nullptr);
    });
    if (p_.spatial_weight) {
      parallel_tasks(lines, slots_, [&](int64_t line, int64_t) { scores(line * p_.width, p_.width, all); });
    }
    parallel_shares(panels(p_.channels), slots_, [&](int64_t begin, int64_t end, int64_t slot) {
      const typename Math::Session session;
      for (int64_t panel = begin; panel < end; ++panel) {
        outputs(tile, panel, all, scratch(slot), nullptr);
      }
    });
  }

  void clear_beyond(int64_t pixels, const Scratch& s) const {
    s.u.clear_beyond(pixels, p_.channels);
    s.h.clear_beyond(pixels, p_.hidden);
  }

  // A panel of h.
  void hidden(int64_t pixels, int64_t panel, const Scratch& s, A* sums, Ahead* ahead) const {
    first_.panel(s.u, pixels, panel, sums, ahead);
    const int64_t first = panel * kPanel, n = least(kPanel, p_.hidden - first);
    p_.activation == Activation::relu ? s.h.template activate<Activation::relu>(sums, pixels, first, n)
                                      : s.h.template activate<Activation::gelu>(sums, pixels, first, n);
  }

  // A panel of y, from h and scale in `s`, by way of what is in `own`.
  void outputs(const Tile& tile, int64_t panel, const Scratch& s, const Scratch& own, Ahead* ahead) const {
    second_.panel(s.h, tile.images * tile.rows * p_.width, panel, own.sums, ahead);
    for (int64_t i = 0; i < tile.images * tile.rows; ++i) {
      finish(tile.b + i / tile.rows, tile.row + i % tile.rows, panel * kPanel,
             own.sums + i * p_.width * kPanel, s.scale + i * p_.width, own.residual);
    }
  }

  // u, the first layer's input, from pixel `at` on: the convolved channels, then the others, gated.
  void mix(int64_t b, int64_t first, int64_t rows, int64_t at, const Rows& u, const Scratch& s) const {
    const int64_t width = p_.width;
    const T* x = static_cast<const T*>(p_.x) + b * p_.x_stride[0] + first * p_.x_stride[2];
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = x + r * p_.x_stride[2] + p_.convolved * p_.x_stride[1];
      u.load(Pixels<const T>{row, p_.x_stride[1], p_.x_stride[3]}, at + r * width, width, p_.convolved,
             kept(), p_.gate ? gates_ + b * kept() : nullptr);
    }
    conv_.pack(b, conv_.first_row(first), conv_.input_rows(rows), s.packed, s.plane, 0);
    const auto store = [&](int64_t channel, int64_t channels, const A* sums) {
      for (int64_t r = 0; r < rows; ++r) {
        u.store(sums + r * conv_.pitch() * kPanel, at + r * width, width, channel, channels);
      }
    };
    conv_.compute(rows, s.packed, s.plane, s.sums, 0, conv_.all_panels(), store);
  }

  // The spatial gate of pixels [first, first + count).
  void scores(int64_t first, int64_t count, const Scratch& s) const {
    const A bias = p_.spatial_bias ? widen<A>(*static_cast<const T*>(p_.spatial_bias)) : A(0);
    for (int64_t i = first; i < first + count; ++i) {
      typename LanesOf<A>::type lanes = {};
      for (int64_t m = 0; m < p_.hidden; m += kLanes) {
        const int64_t live = least<int64_t>(kLanes, p_.hidden - m);
        for (int64_t j = 0; j < live; ++j) lanes[j] += s.h.value(i, m + j) * spatial_[m + j];
      }
      s.scale[i] = hardsigmoid(sum_of<A>(lanes) + bias);
    }
  }

  // A row of sums [width][kPanel], of the channels from `channel` on, to y: gate, bias, residual.
  void finish(int64_t b, int64_t row, int64_t channel, A* sums, const A* scale, A* residual) const {
    const int64_t channels = least(kPanel, p_.channels - channel), width = p_.width;
    const int64_t scaled = p_.spatial_weight ? p_.channels - p_.channels / 2 - channel : 0;
    const int64_t *xs = p_.x_stride, *ys = p_.y_stride;
    const T* x = static_cast<const T*>(p_.x) + b * xs[0] + channel * xs[1] + row * xs[2];
    T* y = static_cast<T*>(p_.y) + b * ys[0] + channel * ys[1] + row * ys[2];
    const auto scale_of = [&](int64_t i) { return scaled > 0 ? scale[i] : A(1); };
    if (xs[1] == 1 && ys[1] == 1) {
      for (int64_t i = 0; i < width; ++i) {
        finish_pixel(sums + i * kPanel, b2_ + channel, p_.residual ? x + i * xs[3] : nullptr, y + i * ys[3],
                     channels, scaled, scale_of(i));
      }
      return;
    }
    if (p_.residual) load_pixels(Pixels<const T>{x, xs[1], xs[3]}, width, channels, residual, kPanel);
    for (int64_t i = 0; i < width; ++i) {
      A* pixel = sums + i * kPanel;
      finish_pixel(pixel, b2_ + channel, p_.residual ? residual + i * kPanel : nullptr, pixel, channels,
                   scaled, scale_of(i));
    }
    store_pixels(sums, kPanel, width, channels, Pixels<T>{y, ys[1], ys[3]});
  }

  const PartialMlpParams& p_;
  const PartialConv2dParams conv_params_;
  typename Math::Convolution conv_;
  Layer first_, second_;
  Arena arena_;
  bool by_layer_ = false;
  int64_t tile_rows_ = 1, tile_images_ = 1, tiles_ = 1, tasks_ = 1, slots_ = 1, scratch_bytes_ = 0;
  int64_t packers_ = 1, pack_scratch_units_ = 0, packed_bytes_ = 0;
  A *gates_ = nullptr, *spatial_ = nullptr, *b2_ = nullptr;
  Unit* pack_scratch_ = nullptr;
  char* scratch_ = nullptr;
};

template <class F>
auto with_mlp(const PartialMlpParams& p, void* memory, const F& f) {
  return with_type<double, float, half, bf16>("partial_mlp", p.type, [&](auto t) {
    using T = decltype(t);
#if defined(__AMX_BF16__)
    if constexpr (PlanesOf<T>::value > 0) return f(PartialMlp<T, TileMath<T>>(p, memory));
#endif
    return f(PartialMlp<T, VectorMath<T, typename KindOf<T>::type>>(p, memory));
  });
}

}  // namespace

size_t partial_mlp_workspace(const PartialMlpParams& p) {
  return with_mlp(p, nullptr, [](const auto& mlp) { return mlp.bytes(); });
}

size_t partial_mlp_packed_bytes(const PartialMlpParams& p) {
  return with_mlp(p, nullptr, [](const auto& mlp) { return mlp.packed_bytes(); });
}

void partial_mlp_pack(const PartialMlpParams& p) {
  with_mlp(p, p.workspace, [](const auto& mlp) { mlp.prepare_weights(); });
}

void partial_mlp(const PartialMlpParams& p) {
  with_mlp(p, p.workspace, [](const auto& mlp) { mlp.run(); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, partial_mlp_workspace, PartialMlpParams)
TRANCHE_CPU_ENTRY(size_t, partial_mlp_packed_bytes, PartialMlpParams)
TRANCHE_CPU_ENTRY(void, partial_mlp_pack, PartialMlpParams)
TRANCHE_CPU_ENTRY(void, partial_mlp, PartialMlpParams)
