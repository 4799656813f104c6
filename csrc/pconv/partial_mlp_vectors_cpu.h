// What a block's two 1x1 layers are made of, in vectors: rows of pixels, and layers that take them.
#pragma once

#include "core/activation_cpu.h"
#include "pconv/partial_conv2d_cpu.h"
#include "pconv/partial_mlp.h"

namespace tranche::cpu::TRANCHE_ISA {

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

template <class T, class K>
struct VectorMath {
  using X = typename K::X;
  using A = typename K::A;
  using Unit = typename K::Unit;
  using Convolution = SliceConvolution<T, K>;
  struct Session {  // what a thread needs while it multiplies: nothing
    ~Session() {}
  };

  // Pixels by `units` units of channels: the input of a layer.
  struct Rows {
    Unit* data;
    int64_t units;

    static int64_t size(int64_t pixels, int64_t units) { return pixels * units; }
    X* at(int64_t pixel, int64_t channel) const {
      return reinterpret_cast<X*>(data + pixel * units) + channel;
    }
    int64_t step() const { return units * K::kPair; }

    void clear_beyond(int64_t pixels, int64_t channels) const {
      if (channels == step()) return;
      for (int64_t i = 0; i < pixels; ++i) {
        for (int64_t c = channels; c < step(); ++c) *at(i, c) = X{};
      }
    }
    // Channels [first, first + n) of pixels [pixel, pixel + count) from a tensor, times `gate` if that is
    // given.
    void load(const Pixels<const T>& from, int64_t pixel, int64_t count, int64_t first, int64_t n,
              const A* gate) const {
      load_pixels(from, count, n, at(pixel, first), step());
      for (int64_t i = 0; gate && i < count; ++i) {
        X* row = at(pixel + i, first);
        for (int64_t c = 0; c < n; ++c) row[c] = narrow<X>(widen<A>(row[c]) * gate[c]);
      }
    }
    // The same from sums [count][kPanel].
    void store(const A* sums, int64_t pixel, int64_t count, int64_t first, int64_t n) const {
      store_pixels(sums, kPanel, count, n, Pixels<X>{at(pixel, first), 1, step()});
    }
    // All pixels' channels [first, first + n) = the activation of sums [pixels][kPanel], which it may
    // overwrite.
    template <Activation kActivation>
    void activate(A* sums, int64_t pixels, int64_t first, int64_t n) const {
      X* h = at(0, first);
      for (int64_t i = 0; i < pixels; ++i, sums += kPanel, h += step()) {
        if constexpr (__is_same(A, double)) {
          for (int64_t c = 0; c < n; ++c) h[c] = activated<kActivation>(sums[c]);
        } else {
#if defined(__AVX512F__)
          for (int64_t c = 0; c < n; c += 16) {
            store_lanes(h + c, activated<kActivation>(vload(sums + c)), n - c);
          }
#else
          for (int64_t c = 0; c < n; c += kWidth) vstore(sums + c, activated<kActivation>(vload(sums + c)));
          store_row(sums, h, n);
#endif
        }
      }
    }
    A value(int64_t pixel, int64_t channel) const { return widen<A>(*at(pixel, channel)); }
  };

  // A 1x1 layer: its weights as panels, in segments that a product can take one after the other.
  struct Layer {
    int64_t outputs = 0, inputs = 0, segments = 0, depth = 0;  // depth: units of a segment
    int64_t* offsets = nullptr;
    Unit* weights = nullptr;
    A* biases = nullptr;

    static constexpr int64_t kSegment = 128;
    Layer(int64_t outputs_, int64_t inputs_) : outputs(outputs_), inputs(inputs_) {
      segments = (units<K>(inputs) + kSegment - 1) / kSegment;
      depth = (units<K>(inputs) + segments - 1) / segments;
    }
    int64_t input_units() const { return segments * depth; }
    // From one pixel of its input to the next.
    int64_t row_units() const { return spread<Unit>(input_units()); }
    int64_t pixel_bytes() const { return row_units() * int64_t(sizeof(Unit)); }
    int64_t panel_units() const { return input_units() * kPanel; }
    void take_weights(Arena& arena) {
      weights = arena.take<Unit>(panels(outputs) * panel_units());
      biases = arena.take<A>(panels(outputs) * kPanel);
    }
    void take(Arena& arena) { offsets = arena.take<int64_t>(segments); }
    static int64_t scratch_units() { return 0; }
    void prepare() const {
      for (int64_t s = 0; s < segments; ++s) offsets[s] = s * depth;
    }
    void pack(const T* w, const T* b, int64_t panel, Unit*) const {
      Unit* to = weights + panel * panel_units();
      pack_panel<K>(w, outputs, inputs, 1, panel * kPanel, to);
      const int64_t packed = units<K>(inputs) * kPanel;
      memset(to + packed, 0, size_t(panel_units() - packed) * sizeof *to);
      for (int64_t o = panel * kPanel; o < (panel + 1) * kPanel; ++o) {
        biases[o] = b && o < outputs ? widen<A>(b[o]) : A(0);
      }
    }
    // How often all panels' products ask for what comes after them.
    int64_t asks(int64_t pixels) const {
      const int64_t pieces = (segments + piece_segments<K>(depth) - 1) / piece_segments<K>(depth);
      return panels(outputs) * pieces * (pixels + kBlockPixels<2> - 1) / kBlockPixels<2>;
    }
    // sums [pixels][kPanel] = panel of outputs of x.
    void panel(const Rows& x, int64_t pixels, int64_t panel, A* sums, Ahead* ahead) const {
      Product<K> a{};
      a.x = x.data;
      a.step = row_units();
      a.offset = offsets;
      a.segments = segments;
      a.depth = depth;
      a.w = weights + panel * panel_units();
      a.bias = biases + panel * kPanel;
      a.out = sums;
      a.runs = 1;
      a.pixels = pixels;
      a.fetch_ahead = panels(outputs) * panel_units() * int64_t(sizeof *a.w) > kSecondLevel;
      a.ahead = ahead;
      product(a, least(kPanel, outputs - panel * kPanel));
    }
  };
};

}  // namespace tranche::cpu::TRANCHE_ISA
