// partial_mlp on the CPU: some rows of an image go through the whole block while they are in the cache.
#include <cstring>
#include <initializer_list>

#include "core/activation_cpu.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "pconv/partial_conv2d_cpu.h"
#include "pconv/partial_mlp.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

// A 1x1 layer: its weights as panels, in segments that a product can take one after the other.
template <class K>
struct Layer {
  int64_t outputs = 0, segments = 0, depth = 0;  // depth: units of a segment
  int64_t* offsets = nullptr;
  typename K::Unit* weights = nullptr;
  typename K::A* biases = nullptr;

  static constexpr int64_t kSegment = 128;
  Layer(int64_t outputs_, int64_t inputs) : outputs(outputs_) {
    segments = (units<K>(inputs) + kSegment - 1) / kSegment;
    depth = (units<K>(inputs) + segments - 1) / segments;
  }
  int64_t input_units() const { return segments * depth; }
  int64_t panel_units() const { return input_units() * kPanel; }
  void take(Arena& arena) {
    offsets = arena.take<int64_t>(segments);
    weights = arena.take<typename K::Unit>(panels(outputs) * panel_units());
    biases = arena.take<typename K::A>(panels(outputs) * kPanel);
  }
  template <class T>
  void pack(const T* w, const T* b, int64_t inputs, int64_t panel) const {
    typename K::Unit* to = weights + panel * panel_units();
    pack_panel<K>(w, outputs, inputs, 1, panel * kPanel, to);
    const int64_t packed = units<K>(inputs) * kPanel;
    memset(to + packed, 0, size_t(panel_units() - packed) * sizeof *to);
    for (int64_t o = panel * kPanel; o < (panel + 1) * kPanel; ++o) {
      biases[o] = b && o < outputs ? widen<typename K::A>(b[o]) : typename K::A(0);
    }
  }
  // sums [pixels][kPanel] = panel of outputs of x [pixels][input_units()].
  void panel(const typename K::Unit* x, int64_t pixels, int64_t panel, typename K::A* sums) const {
    Product<K> a{};
    a.x = x;
    a.step = input_units();
    a.offset = offsets;
    a.segments = segments;
    a.depth = depth;
    a.w = weights + panel * panel_units();
    a.bias = biases + panel * kPanel;
    a.out = sums;
    a.runs = 1;
    a.pixels = pixels;
    a.fetch_ahead = panels(outputs) * panel_units() * int64_t(sizeof *a.w) > kSecondLevel;
    product(a, least(kPanel, outputs - panel * kPanel));
  }
};

using Activation = PartialMlpParams::Activation;

template <Activation kActivation>
TRANCHE_INLINE Vec activated(Vec x) {
  return kActivation == Activation::relu ? vrelu(x) : vgelu(x);
}

template <Activation kActivation>
TRANCHE_INLINE double activated(double x) {
  if (kActivation == Activation::relu) return x < 0.0 ? 0.0 : x;
  return 0.5 * x * __builtin_erfc(-x * 0.70710678118654752440);
}

// h [pixels][step] = the activation of n outputs of sums [pixels][kPanel], which it may overwrite.
template <Activation kActivation, class A, class X>
static void activate(A* sums, int64_t pixels, int64_t n, X* h, int64_t step) {
  for (int64_t i = 0; i < pixels; ++i, sums += kPanel, h += step) {
    if constexpr (__is_same(A, double)) {
      for (int64_t c = 0; c < n; ++c) h[c] = activated<kActivation>(sums[c]);
    } else {
#if defined(__AVX512F__)
      for (int64_t c = 0; c < n; c += 16) store_lanes(h + c, activated<kActivation>(vload(sums + c)), n - c);
#else
      for (int64_t c = 0; c < n; c += kWidth) vstore(sums + c, activated<kActivation>(vload(sums + c)));
      store_row(sums, h, n);
#endif
    }
  }
}

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

template <class A>
TRANCHE_INLINE A hardsigmoid(A x) {
  const A shifted = x + A(3);
  return (shifted < A(0) ? A(0) : shifted > A(6) ? A(6) : shifted) / A(6);
}

template <class T, class K>
class PartialMlp {
  using X = typename K::X;
  using A = typename K::A;
  using Unit = typename K::Unit;

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
    constexpr int64_t kTilePixels = 224, kTileBytes = 1 << 20;
    const int64_t threads = num_threads(), image = p.height * p.width;
    const int64_t pixel_bytes = (first_.input_units() + second_.input_units()) * int64_t(sizeof(Unit));
    const int64_t pixels = least(kTilePixels, most<int64_t>(1, kTileBytes / pixel_bytes));
    const int64_t wanted = (2 * threads + p.batch - 1) / p.batch;  // tiles of an image
    tile_rows_ = least(conv_.pass_rows(), most<int64_t>(1, pixels / p.width));
    tile_rows_ = most<int64_t>(1, least(tile_rows_, p.height / wanted));
    tile_images_ = tile_rows_ < p.height ? 1 : most<int64_t>(1, least(pixels / image, p.batch / threads));
    tiles_ = (p.height + tile_rows_ - 1) / tile_rows_;
    tasks_ = (p.batch + tile_images_ - 1) / tile_images_ * tiles_;
    slots_ = least(threads, tasks_);
    conv_.take(arena_);
    first_.take(arena_);
    second_.take(arena_);
    spatial_ = arena_.template take<A>(p.spatial_weight ? round_up(p.hidden, kPanel) : 0);
    b2_ = arena_.template take<A>(panels(p.channels) * kPanel);
    scratch_bytes_ = Scratch(*this, nullptr).bytes;
    scratch_ = arena_.template take<char>(slots_ * scratch_bytes_);
  }

  size_t bytes() const { return size_t(arena_.used()); }

  void run() const {
    prepare();
    parallel_tasks(tasks_, slots_, [&](int64_t task, int64_t slot) {
      Tile tile;
      tile.b = task / tiles_ * tile_images_;
      tile.images = least(tile_images_, p_.batch - tile.b);
      tile.row = task % tiles_ * tile_rows_;
      tile.rows = least(tile_rows_, p_.height - tile.row);
      run(tile, Scratch(*this, scratch_ + slot * scratch_bytes_));
    });
  }

 private:
  // Rows [row, row + rows) of images [b, b + images).
  struct Tile {
    int64_t b, images, row, rows;
  };

  // What a thread works in.
  struct Scratch {
    Unit *packed, *u, *h;
    A *sums, *residual, *scale;
    int64_t bytes;
    Scratch(const PartialMlp& m, void* memory) {
      Arena arena(memory);
      const int64_t pixels = m.tile_images_ * m.tile_rows_ * m.p_.width;
      packed = arena.take<Unit>(m.conv_.packed_units(m.conv_.input_rows(m.tile_rows_)));
      u = arena.take<Unit>(pixels * m.first_.input_units());
      h = arena.take<Unit>(pixels * m.second_.input_units());
      sums = arena.take<A>(pixels * kPanel);
      residual = arena.take<A>(m.p_.width * kPanel);
      scale = arena.take<A>(pixels);
      bytes = arena.used();
    }
  };

  void prepare() const {
    conv_.prepare();
    for (const Layer<K>* layer : {&first_, &second_}) {
      for (int64_t s = 0; s < layer->segments; ++s) layer->offsets[s] = s * layer->depth;
    }
    const int64_t count = panels(p_.hidden), all = count + panels(p_.channels);
    const auto pack = [&](int64_t i) {
      if (i < count) {
        first_.pack(static_cast<const T*>(p_.w1), static_cast<const T*>(p_.b1), p_.channels, i);
      } else {
        second_.pack(static_cast<const T*>(p_.w2), static_cast<const T*>(nullptr), p_.hidden, i - count);
      }
    };
    constexpr int64_t kWorthThreads = 32768;
    if (int64_t(p_.hidden) * p_.channels >= kWorthThreads) {
      parallel_for(all, pack);
    } else {
      for (int64_t i = 0; i < all; ++i) pack(i);
    }
    const T *b2 = static_cast<const T*>(p_.b2), *spatial = static_cast<const T*>(p_.spatial_weight);
    for (int64_t i = 0; i < panels(p_.channels) * kPanel; ++i)
      b2_[i] = i < p_.channels ? widen<A>(b2[i]) : A(0);
    for (int64_t i = 0; spatial && i < round_up(p_.hidden, kPanel); ++i) {
      spatial_[i] = i < p_.hidden ? widen<A>(spatial[i]) : A(0);
    }
  }

  void run(const Tile& tile, const Scratch& s) const {
    const int64_t image_pixels = tile.rows * p_.width, pixels = tile.images * image_pixels;
    const int64_t u_step = first_.input_units() * K::kPair, h_step = second_.input_units() * K::kPair;
    X *u = reinterpret_cast<X*>(s.u), *h = reinterpret_cast<X*>(s.h);
    for (int64_t i = 0; i < tile.images; ++i) {
      mix(tile.b + i, tile.row, tile.rows, u + i * image_pixels * u_step, u_step, s);
    }
    clear_beyond(u, pixels, p_.channels, u_step);
    clear_beyond(h, pixels, p_.hidden, h_step);
    for (int64_t panel = 0; panel < panels(p_.hidden); ++panel) {
      first_.panel(s.u, pixels, panel, s.sums);
      const int64_t first = panel * kPanel, n = least(kPanel, p_.hidden - first);
      p_.activation == Activation::relu ? activate<Activation::relu>(s.sums, pixels, n, h + first, h_step)
                                        : activate<Activation::gelu>(s.sums, pixels, n, h + first, h_step);
    }
    if (p_.spatial_weight) scores(pixels, h, h_step, s.scale);
    for (int64_t panel = 0; panel < panels(p_.channels); ++panel) {
      second_.panel(s.h, pixels, panel, s.sums);
      for (int64_t i = 0; i < tile.images * tile.rows; ++i) {
        finish(tile.b + i / tile.rows, tile.row + i % tile.rows, panel * kPanel,
               s.sums + i * p_.width * kPanel, s.scale + i * p_.width, s.residual);
      }
    }
  }

  static void clear_beyond(X* rows, int64_t pixels, int64_t live, int64_t step) {
    if (live == step) return;
    for (int64_t i = 0; i < pixels; ++i) {
      for (int64_t c = live; c < step; ++c) rows[i * step + c] = X{};
    }
  }

  // The first layer's input: the convolved channels, then the others, gated.
  void mix(int64_t b, int64_t first, int64_t rows, X* u, int64_t step, const Scratch& s) const {
    const int64_t width = p_.width, kept = p_.channels - p_.convolved;
    const T* x = static_cast<const T*>(p_.x) + b * p_.x_stride[0] + first * p_.x_stride[2];
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = x + r * p_.x_stride[2] + p_.convolved * p_.x_stride[1];
      load_pixels(Pixels<const T>{row, p_.x_stride[1], p_.x_stride[3]}, width, kept,
                  u + r * width * step + p_.convolved, step);
    }
    const T* gate = static_cast<const T*>(p_.gate);
    for (int64_t i = 0; gate && i < rows * width; ++i) {
      X* pixel = u + i * step + p_.convolved;
      for (int64_t c = 0; c < kept; ++c) {
        pixel[c] = narrow<X>(widen<A>(pixel[c]) * widen<A>(gate[b * kept + c]));
      }
    }
    conv_.pack(b, first, conv_.input_rows(rows), s.packed, 0, 0);
    conv_.compute(rows, s.packed, 0, s.sums, [&](int64_t channel, int64_t channels, const A* sums) {
      store_pixels(sums, kPanel, rows * width, channels, Pixels<X>{u + channel, 1, step});
    });
  }

  void scores(int64_t pixels, const X* h, int64_t step, A* scale) const {
    const A bias = p_.spatial_bias ? widen<A>(*static_cast<const T*>(p_.spatial_bias)) : A(0);
    for (int64_t i = 0; i < pixels; ++i) {
      A lanes[16] = {};
      const X* pixel = h + i * step;
      for (int64_t m = 0; m < p_.hidden; m += 16) {
        const int64_t live = least<int64_t>(16, p_.hidden - m);
        for (int64_t j = 0; j < live; ++j) lanes[j] += widen<A>(pixel[m + j]) * spatial_[m + j];
      }
      for (int half = 8; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
      }
      scale[i] = hardsigmoid(lanes[0] + bias);
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
  SliceConvolution<T, K> conv_;
  Layer<K> first_, second_;
  Arena arena_;
  int64_t tile_rows_ = 1, tile_images_ = 1, tiles_ = 1, tasks_ = 1, slots_ = 1, scratch_bytes_ = 0;
  A *spatial_ = nullptr, *b2_ = nullptr;
  char* scratch_ = nullptr;
};

template <class F>
auto with_mlp(const PartialMlpParams& p, void* memory, const F& f) {
  return with_type<double, float, half, bf16>("partial_mlp", p.type, [&](auto t) {
    using T = decltype(t);
    return f(PartialMlp<T, typename KindOf<T>::type>(p, memory));
  });
}

}  // namespace

size_t partial_mlp_workspace(const PartialMlpParams& p) {
  return with_mlp(p, nullptr, [](const auto& mlp) { return mlp.bytes(); });
}

void partial_mlp(const PartialMlpParams& p) {
  with_mlp(p, p.workspace, [](const auto& mlp) { mlp.run(); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, partial_mlp_workspace, PartialMlpParams)
TRANCHE_CPU_ENTRY(void, partial_mlp, PartialMlpParams)
