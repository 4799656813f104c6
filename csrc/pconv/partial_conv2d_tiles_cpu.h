// The convolution of a slice of channels on AMX tiles: what SliceConvolution is, for one group and bf16, or
// float as the sum of three bf16.
//
// With stride 1 the taps of a kernel's row lie side by side in the packed rows and are one segment, and all
// pixels of some rows, the padding between rows with them, are one run. With another stride each output pixel
// gets its whole window, [kh][kw][c], and that is the segment.
#pragma once

#include "pconv/partial_conv2d_cpu.h"
#include "pconv/product_tiles_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

template <class T>
class TileConvolution {
 public:
  static constexpr int kPlanes = PlanesOf<T>::value;
  static constexpr int64_t kSharedWeights = 2048;  // of a pixel, or more: threads share the outputs
  using A = float;
  using Unit = uint32_t;

  explicit TileConvolution(const PartialConv2dParams& p)
      : p_(p),
        gathers_(p.stride[0] != 1 || p.stride[1] != 1),
        whole_(gathers_ && p.padding[0] + p.padding[1] == 0 && p.dilation[1] == 1 && p.x_stride[1] == 1 &&
               p.x_stride[3] == p.c_in && p.c_in % 2 == 0),
        taps_(int64_t(p.kernel[0]) * p.kernel[1]),
        pixel_(units<B16>(p.c_in)),
        packed_width_(p.width + 2 * int64_t(p.padding[1])),
        steps_(steps_of(p)) {
    constexpr int64_t kPassPixels = 224;
    pass_rows_ = most<int64_t>(1, least(p.out_height, kPassPixels / most<int64_t>(1, p.out_width)));
  }

  // Whether tiles are the faster way: a property of the weight's shape alone.
  static bool serves(const PartialConv2dParams& p) {
    if (p.groups != 1) return false;
    // In the time of a tile product a vector unit sums up 2 channels of as many pixels and outputs, or 5
    // where rows of tiles cross lines of the cache.
    const TileSteps steps = steps_of(p);
    const bool gathers = p.stride[0] != 1 || p.stride[1] != 1;
    if (kPlanes > 1 && gathers && p.c_in < kGathered) return false;
    const int64_t step = units<B16>(p.c_in) * (gathers ? int64_t(p.kernel[0]) * p.kernel[1] : 1);
    const int64_t product = (kPlanes == 1 ? 1 : 6) * (step % 16 == 0 ? 2 : 5);
    return product * steps.count() <= int64_t(p.kernel[0]) * p.kernel[1] * p.c_in;
  }

  void take_weights(Arena& arena) {
    weights_ = arena.take<Unit>(panels(p_.c_out) * panel_units());
    biases_ = arena.take<A>(panels(p_.c_out) * kPanel);
  }
  void take(Arena& arena) {
    offsets_ = arena.take<int64_t>(steps_.count());
    slots_ = least<int64_t>(num_threads(), panels(p_.c_out));
    scratch_ = arena.take<Unit>(slots_ * scratch_units());
  }

  void prepare() const {
    for (int64_t s = 0; s < steps_.segments; ++s) {
      const int64_t segment = !merges(p_) ? s / p_.kernel[1] * p_.dilation[0] * row_units() +
                                                s % p_.kernel[1] * p_.dilation[1] * pixel_
                                          : s * p_.dilation[0] * row_units();
      for (int64_t i = 0; i < steps_.group; ++i) offsets_[s * steps_.group + i] = segment + steps_.begin(i);
    }
  }

  void prepare_weights() const {
    const T* bias = static_cast<const T*>(p_.bias);
    for (int64_t o = 0; o < panels(p_.c_out) * kPanel; ++o) {
      biases_[o] = bias && o < p_.c_out ? widen<A>(bias[o]) : A(0);
    }
    const auto pack = [&](int64_t i, int64_t slot) {
      pack_tiles<kPlanes>(static_cast<const T*>(p_.weight), p_.c_out, p_.c_in, taps_, i * kPanel, steps_,
                          scratch_ + slot * scratch_units(), weights_ + i * panel_units());
    };
    constexpr int64_t kWorthThreads = 32768;
    if (slots_ > 1 && taps_ * p_.c_in * p_.c_out >= kWorthThreads) {
      parallel_tasks(panels(p_.c_out), slots_, pack);
    } else {
      for (int64_t i = 0; i < panels(p_.c_out); ++i) pack(i, 0);
    }
  }

  int64_t pass_rows() const { return pass_rows_; }
  int64_t row_units() const { return gathers_ ? p_.out_width * window_units() : packed_width_ * pixel_; }
  // The packed row where an output row's window begins.
  int64_t first_row(int64_t output) const { return output; }
  int64_t input_rows(int64_t rows) const {
    return gathers_ ? rows : rows + int64_t(p_.kernel[0] - 1) * p_.dilation[0];
  }
  int64_t packed_rows() const { return gathers_ ? p_.out_height : p_.height + 2 * int64_t(p_.padding[0]); }
  bool packs_apart() const { return !gathers_ || whole_; }  // rows may be packed by several threads at once
  // Pixels from one row of sums to the next.
  int64_t pitch() const { return gathers_ ? p_.out_width : packed_width_; }
  // Units of one part of `rows` packed rows: the last tile reads beyond them, and a row to gather from may be
  // behind.
  int64_t plane_units(int64_t rows) const {
    const int64_t beyond = kTilePixels * step() + steps_.depth;
    return round_up(rows * row_units() + beyond, 16) + (gathers_ && !whole_ ? packed_width_ * pixel_ : 0);
  }
  int64_t packed_units(int64_t rows) const { return kPlanes * plane_units(rows); }
  int64_t pass_sums() const { return round_up(pass_rows_ * pitch(), kTilePixels) * kPanel; }

  // Rows [first, first + rows) of those that image b is packed to, to row `at` of packed memory, of which
  // `plane` is plane_units.
  void pack(int64_t b, int64_t first, int64_t rows, Unit* memory, int64_t plane, int64_t at) const {
    Unit *packed = memory + at * row_units(), *line = memory + plane - packed_width_ * pixel_;
    for (int64_t r = first; r < first + rows; ++r, packed += row_units()) {
      if (!gathers_) {
        pack_row(b, r - p_.padding[0], packed, plane);
        continue;
      }
      for (int64_t ky = 0; ky < p_.kernel[0]; ++ky) {
        if (whole_) {
          const T* x = row_of(b, r * p_.stride[0] + ky * p_.dilation[0]);
          uint16_t* to = reinterpret_cast<uint16_t*>(packed + ky * p_.kernel[1] * pixel_);
          for (int64_t i = 0; i < p_.out_width; ++i, x += p_.stride[1] * p_.c_in, to += window_units() * 2) {
            put(x, p_.kernel[1] * p_.c_in, to, plane * 2);
          }
          continue;
        }
        pack_row(b, r * p_.stride[0] + ky * p_.dilation[0] - p_.padding[0], line, plane);
        for (int64_t part = 0; part < kPlanes; ++part) {
          const Unit* from = line + part * plane;
          Unit* to = packed + part * plane + ky * p_.kernel[1] * pixel_;
          for (int64_t i = 0; i < p_.out_width; ++i, from += p_.stride[1] * pixel_, to += window_units()) {
            for (int64_t kx = 0; kx < p_.kernel[1]; ++kx) {
              copy_row(from + kx * p_.dilation[1] * pixel_, to + kx * pixel_, pixel_);
            }
          }
        }
      }
    }
  }

  int64_t all_panels() const { return panels(p_.c_out); }

  // Panels [begin, end) of at most pass_rows() output rows, from packed rows that begin at the first one
  // needed. Calls epilogue(first output channel, channels, sums [rows][pitch()][kPanel]) for each.
  template <class Epilogue>
  void compute(int64_t rows, const Unit* packed, int64_t plane, A* sums, int64_t begin, int64_t end,
               const Epilogue& epilogue) const {
    TileProduct a{};
    const int64_t pixels = (rows - 1) * pitch() + p_.out_width;
    a.blocks = (pixels + kTilePixels - 1) / kTilePixels;
    a.rows = (pixels + a.blocks - 1) / a.blocks;
    const Tiles tiles = tiles_of(a.rows, steps_.unit);
    a.x = packed;
    a.step = step();
    a.block = a.rows * step();
    a.plane = plane;
    a.offset = offsets_;
    a.steps = steps_.count();
    a.group = steps_.group;
    a.overlap = steps_.overlap();
    a.depth = steps_.unit;
    a.out = sums;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t live = least(kPanel, p_.c_out - panel * kPanel);
      a.w = weights_ + panel * panel_units();
      a.bias = biases_ + panel * kPanel;
      a.fetch_ahead = panel + 1 < end;
      product<kPlanes>(a, live);
      for (int64_t r = 0; r < rows; ++r) mend<kPlanes>(a, r * pitch(), p_.out_width, live);
      epilogue(panel * kPanel, live, static_cast<const A*>(sums));
    }
  }

 private:
  // Channels of a pixel that are worth splitting and copying into the windows of a strided convolution.
  static constexpr int64_t kGathered = 8;
  // Weights of a layer of single pixels, a classifier mostly, that memory gives sooner whole than in parts.
  static constexpr int64_t kStreamed = 1 << 20;

  // The taps of a kernel's row as one segment.
  static bool merges(const PartialConv2dParams& p) { return p.dilation[1] == 1 || p.kernel[1] == 1; }
  static TileSteps steps_of(const PartialConv2dParams& p) {
    const int64_t pixel = units<B16>(p.c_in), kh = p.kernel[0], kw = p.kernel[1];
    if (p.stride[0] != 1 || p.stride[1] != 1) return TileSteps(1, kh * kw * pixel);
    return merges(p) ? TileSteps(kh, kw * pixel) : TileSteps(kh * kw, pixel);
  }

  // Of a pixel's window in the packed rows: lines of one set of the cache are not to hold all rows of a tile.
  int64_t window_units() const { return spread(taps_ * pixel_); }
  static int64_t spread(int64_t units) { return units % 32 == 0 ? units + 16 : units; }
  int64_t step() const { return gathers_ ? window_units() : pixel_; }
  int64_t panel_units() const { return steps_.count() * kPlanes * 2 * kTileUnits; }
  int64_t scratch_units() const { return round_up(taps_ * p_.c_in * kPanel, 16); }

  const T* row_of(int64_t b, int64_t y) const {
    return static_cast<const T*>(p_.x) + b * p_.x_stride[0] + p_.start * p_.x_stride[1] + y * p_.x_stride[2];
  }

  // Row y of the image with its padding, in every part.
  void pack_row(int64_t b, int64_t y, Unit* packed, int64_t plane) const {
    const int64_t units = packed_width_ * pixel_, side = p_.padding[1] * pixel_;
    const bool inside = y >= 0 && y < p_.height;
    for (int64_t part = 0; part < kPlanes; ++part) {
      Unit* to = packed + part * plane;
      memset(to, 0, size_t(inside ? side : units) * sizeof(Unit));
      if (inside) memset(to + units - side, 0, size_t(side) * sizeof(Unit));
    }
    if (!inside) return;
    const T* x = row_of(b, y);
    const int64_t channel = p_.x_stride[1], pixel = p_.x_stride[3];
    uint16_t* to = reinterpret_cast<uint16_t*>(packed + side);
    if (channel == 1) {
      // the slices of a row lie apart, which hardware does not foresee
      const int64_t ahead = p_.x_stride[2] * int64_t(sizeof(T)), bytes = p_.c_in * int64_t(sizeof(T));
      for (int64_t i = 0; i < p_.width; ++i, x += pixel) {
        for (int64_t at = 0; at < bytes; at += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(x) + ahead + at);
        }
        put(x, p_.c_in, to + i * pixel_ * 2, plane * 2);
      }
      return;
    }
    constexpr int64_t kBlock = 16;
    T block[kBlock * kBlock];
    for (int64_t i = 0; i < p_.width; i += kBlock) {
      const int64_t count = least(kBlock, p_.width - i);
      for (int64_t c = 0; c < p_.c_in; c += kBlock) {
        const int64_t live = least(kBlock, p_.c_in - c);
        load_pixels(Pixels<const T>{x + i * pixel + c * channel, channel, pixel}, count, live, block, kBlock);
        for (int64_t k = 0; k < count; ++k) {
          put16(block + k * kBlock, int(live), to + (i + k) * pixel_ * 2 + c, plane * 2);
        }
      }
    }
  }

  // n channels that lie side by side.
  static void put(const T* from, int64_t n, uint16_t* to, int64_t plane) {
    int64_t c = 0;
    for (; kPlanes > 1 && c + 32 <= n; c += 32) {
      __m512i part[kPlanes];
      split32(load16(from + c, 16), load16(from + c + 16, 16), part);
#pragma GCC unroll 3
      for (int p = 0; p < kPlanes; ++p) _mm512_storeu_si512(to + c + p * plane, part[p]);
    }
    for (; c < n; c += 16) put16(from + c, int(least<int64_t>(16, n - c)), to + c, plane);
  }

  TRANCHE_INLINE void put16(const T* from, int n, uint16_t* to, int64_t plane) {
    if constexpr (kPlanes == 1) {
      const __mmask16 live = __mmask16((1u << n) - 1u), whole = __mmask16((1u << (n + n % 2)) - 1u);
      const __m256i x = _mm256_maskz_loadu_epi16(live, from);
      n == 16 ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x)
              : _mm256_mask_storeu_epi16(to, whole, x);
    } else {
      __m256i part[kPlanes];
      split16(load16(from, n), part);
      for (int p = 0; p < kPlanes; ++p, to += plane) {
        const __mmask16 whole = __mmask16((1u << (n + n % 2)) - 1u);
        n == 16 ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), part[p])
                : _mm256_mask_storeu_epi16(to, whole, part[p]);
      }
    }
  }

  const PartialConv2dParams& p_;
  const bool gathers_, whole_;  // whole: a kernel's row of a window lies side by side in x
  const int64_t taps_, pixel_, packed_width_;
  const TileSteps steps_;
  int64_t pass_rows_ = 1, slots_ = 1;
  int64_t* offsets_ = nullptr;
  Unit *weights_ = nullptr, *scratch_ = nullptr;
  A* biases_ = nullptr;
};

}  // namespace tranche::cpu::TRANCHE_ISA
