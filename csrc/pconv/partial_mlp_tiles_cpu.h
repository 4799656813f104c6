// What a block's two 1x1 layers are made of, on AMX tiles.
#pragma once

#include "pconv/partial_conv2d_tiles_cpu.h"
#include "pconv/partial_mlp_vectors_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

template <class T>
struct TileMath {
  static constexpr int kPlanes = PlanesOf<T>::value;
  using A = float;
  using Unit = uint32_t;
  using Convolution = TileConvolution<T>;
  using Session = Tiles;

  // Pixels by channels as left tiles: [pixels / 16][channels / 32][parts][16][32], zeros beyond the channels.
  struct Rows {
    Unit* data;
    int64_t units;  // of a pixel and a part, a multiple of 16

    static int64_t size(int64_t pixels, int64_t units) {
      return round_up(pixels, kTilePixels) * units * kPlanes;
    }
    bf16* at(int64_t pixel, int64_t channel) const {
      const int64_t tile = (pixel / kTilePixels * (units / 16) + channel / 32) * kPlanes;
      return reinterpret_cast<bf16*>(data + tile * kTileUnits) + pixel % kTilePixels * 32 + channel % 32;
    }
    TRANCHE_INLINE void put(bf16* to, Vec x, Mask live) {
      __m256i part[kPlanes];
      split16(x, part);
      for (int p = 0; p < kPlanes; ++p) {
        if (live == 0xffff) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + p * 2 * kTileUnits), part[p]);
        } else {
          _mm256_mask_storeu_epi16(to + p * 2 * kTileUnits, live, part[p]);
        }
      }
    }
    TRANCHE_INLINE void put32(bf16* to, Vec low, Vec high) {
      __m512i part[kPlanes];
      split32(low, high, part);
#pragma GCC unroll 3
      for (int p = 0; p < kPlanes; ++p) _mm512_storeu_si512(to + p * 2 * kTileUnits, part[p]);
    }
    static Mask first_lanes(int64_t n) {
      return n >= 16 ? Mask(0xffff) : n <= 0 ? Mask(0) : Mask((1u << n) - 1u);
    }

    void clear_beyond(int64_t pixels, int64_t channels) const {
      for (int64_t c = channels / 16 * 16; c < 2 * units; c += 16) {
        const Mask beyond = Mask(~first_lanes(channels - c));
        for (int64_t i = 0; beyond && i < pixels; ++i) put(at(i, c), vset(0.0f), beyond);
      }
    }
    // Channels [first, first + n) of pixels [pixel, pixel + count) from a tensor, times `gate` if that is
    // given.
    void load(const Pixels<const T>& from, int64_t pixel, int64_t count, int64_t first, int64_t n,
              const A* gate) const {
      T block[256];
      for (int64_t done = 0; done < n;) {
        if ((first + done) % 32 == 0 && n - done >= 32 && from.channel == 1) {
          const T* source = from.data + done;
          const Vec low = gate ? vload(gate + done) : vset(1.0f);
          const Vec high = gate ? vload(gate + done + 16) : vset(1.0f);
          for (int64_t i = 0; i < count; ++i, source += from.pixel) {
            put32(at(pixel + i, first + done), vmul(load16(source, 16), low),
                  vmul(load16(source + 16, 16), high));
          }
          done += 32;
          continue;
        }
        const int64_t width = least(16 - (first + done) % 16, n - done);
        const Mask live = first_lanes(width);
        const Vec scale = gate ? _mm512_maskz_loadu_ps(live, gate + done) : vset(1.0f);
        for (int64_t i = 0; i < count; i += 16) {
          const int64_t some = least<int64_t>(16, count - i);
          const T* source = from.data + done * from.channel + i * from.pixel;
          int64_t step = from.pixel;
          if (from.channel != 1) {
            load_pixels(Pixels<const T>{source, from.channel, from.pixel}, some, width, block, 16);
            source = block;
            step = 16;
          }
          for (int64_t k = 0; k < some; ++k, source += step) {
            Vec x = load16(source, int(width));
            if (gate) x = vmul(x, scale);
            put(at(pixel + i + k, first + done), x, live);
          }
        }
        done += width;
      }
    }
    // The same from sums [count][kPanel].
    void store(const A* sums, int64_t pixel, int64_t count, int64_t first, int64_t n) const {
      for (int64_t i = 0; i < count; ++i, sums += kPanel) {
        if (n == kPanel && first % kPanel == 0) {
          put32(at(pixel + i, first), vload(sums), vload(sums + 16));
          continue;
        }
        for (int64_t c = 0; c < n; c += 16)
          put(at(pixel + i, first + c), vload(sums + c), first_lanes(n - c));
      }
    }
    // All pixels' channels [first, first + n) = the activation of sums [pixels][kPanel].
    template <Activation kActivation>
    void activate(A* sums, int64_t pixels, int64_t first, int64_t n) const {
      if (n == kPanel) {
        for (int64_t i = 0; i < pixels; ++i, sums += kPanel) {
          put32(at(i, first), activated<kActivation>(vload(sums)), activated<kActivation>(vload(sums + 16)));
        }
        return;
      }
      const Mask left = first_lanes(n), right = first_lanes(n - 16);
      for (int64_t i = 0; i < pixels; i += kTilePixels) {
        bf16* to = at(i, first);
        for (int64_t k = 0; k < least(kTilePixels, pixels - i); ++k, sums += kPanel, to += 32) {
          put(to, activated<kActivation>(vload(sums)), left);
          if (right) put(to + 16, activated<kActivation>(vload(sums + 16)), right);
        }
      }
    }
    A value(int64_t pixel, int64_t channel) const {
      const bf16* part = at(pixel, channel);
      float sum = 0.0f;
      for (int p = 0; p < kPlanes; ++p) sum += to_float(part[p * 2 * kTileUnits]);
      return sum;
    }
  };

  struct Layer {
    int64_t outputs = 0, inputs = 0;
    int64_t* offsets = nullptr;
    Unit* weights = nullptr;
    A* biases = nullptr;

    Layer(int64_t outputs_, int64_t inputs_) : outputs(outputs_), inputs(inputs_) {}
    int64_t steps() const { return (inputs + 31) / 32; }
    int64_t row_units() const { return steps() * 16; }
    int64_t pixel_bytes() const { return row_units() * kPlanes * int64_t(sizeof(Unit)); }
    int64_t panel_units() const { return steps() * kPlanes * 2 * kTileUnits; }
    void take_weights(Arena& arena) {
      weights = arena.take<Unit>(panels(outputs) * panel_units());
      biases = arena.take<A>(panels(outputs) * kPanel);
    }
    void take(Arena& arena) { offsets = arena.take<int64_t>(steps()); }
    int64_t scratch_units() const { return row_units() * 2 * kPanel; }
    void prepare() const {
      for (int64_t s = 0; s < steps(); ++s) offsets[s] = s * kPlanes * kTileUnits;
    }
    void pack(const T* w, const T* b, int64_t panel, Unit* scratch) const {
      pack_tiles<kPlanes>(w, outputs, inputs, 1, panel * kPanel, TileSteps(1, row_units()), scratch,
                          weights + panel * panel_units());
      for (int64_t o = panel * kPanel; o < (panel + 1) * kPanel; ++o) {
        biases[o] = b && o < outputs ? widen<A>(b[o]) : A(0);
      }
    }
    int64_t asks(int64_t pixels) const {
      return panels(outputs) * tile_asks<kPlanes, 2>((pixels + kTilePixels - 1) / kTilePixels, steps());
    }
    void panel(const Rows& x, int64_t pixels, int64_t panel, A* sums, Ahead* ahead) const {
      TileProduct a{};
      a.x = x.data;
      a.step = 16;
      a.block = steps() * kPlanes * kTileUnits;
      a.plane = kTileUnits;
      a.offset = offsets;
      a.steps = a.group = steps();
      a.depth = 16;
      a.w = weights + panel * panel_units();
      a.bias = biases + panel * kPanel;
      a.out = sums;
      a.blocks = (pixels + kTilePixels - 1) / kTilePixels;
      a.rows = kTilePixels;
      a.fetch_ahead = panel + 1 < panels(outputs);
      a.ahead = ahead;
      const int64_t live = least(kPanel, outputs - panel * kPanel);
      product<kPlanes>(a, live);
      mend<kPlanes>(a, 0, pixels, live);
    }
  };
};

}  // namespace tranche::cpu::TRANCHE_ISA
