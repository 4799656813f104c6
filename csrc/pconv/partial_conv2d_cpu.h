// The convolution of a slice of channels, some output rows at a time: input rows are packed with their zero
// padding, [width + 2 padding][c] in the type that the product takes; then panel by panel of outputs the
// product runs over all pixels of the rows, and an epilogue takes what it made while that is in the cache.
#pragma once

#include <cstring>

#include "core/tasks.h"
#include "pconv/partial_conv2d.h"
#include "pconv/product_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

// A channel each: vector lanes are channels, in float or double.
TRANCHE_INLINE bool is_depthwise(const PartialConv2dParams& p) {
  return p.c_in == p.groups && p.c_out == p.groups && p.groups > 1;
}

template <class T, class K>
class SliceConvolution {
 public:
  static constexpr int64_t kSharedWeights = kWeightsOfPixel;
  using X = typename K::X;
  using A = typename K::A;
  using Unit = typename K::Unit;

  explicit SliceConvolution(const PartialConv2dParams& p)
      : p_(p),
        depthwise_(is_depthwise(p)),
        groups_(depthwise_ ? 1 : p.groups),
        group_in_(p.c_in / groups_),
        group_out_(p.c_out / groups_),
        depth_(depthwise_ ? 1 : units<K>(group_in_)),
        taps_(int64_t(p.kernel[0]) * p.kernel[1]),
        merged_(taps_of_segment(p, depth_)),
        pixel_(merged_ > 1 ? units<K>(group_in_) * groups_
                           : spread<Unit>(units<K>(group_in_) * groups_, p.stride[1])),
        packed_width_(p.width + 2 * int64_t(p.padding[1])) {
    // A pass makes about as many pixels as let its results stay in the first-level cache.
    constexpr int64_t kPassPixels = 224;
    pass_rows_ = most<int64_t>(1, least(p.out_height, kPassPixels / most<int64_t>(1, p.out_width)));
  }

  // What all threads share: of the weights, which may outlive a call and know nothing of an image, and the
  // rest.
  void take_weights(Arena& arena) {
    weights_ = arena.take<Unit>(all_panels() * panel_units());
    biases_ = arena.take<A>(all_panels() * kPanel);
  }
  void take(Arena& arena) { offsets_ = arena.take<int64_t>(segments()); }

  // Where each segment begins in the window of an output.
  void prepare() const {
    for (int64_t s = 0; s < segments(); ++s) {
      const int64_t ky = s * merged_ / p_.kernel[1], kx = s * merged_ % p_.kernel[1];
      offsets_[s] = (ky * p_.dilation[0] * packed_width_ + kx * p_.dilation[1]) * pixel_;
    }
  }

  // The weights of all groups as panels.
  void prepare_weights() const {
    const int64_t count = all_panels();
    const auto pack = [&](int64_t i) {
      const int64_t g = i / panels(group_out_), first = i % panels(group_out_) * kPanel;
      const int64_t inputs = depthwise_ ? 1 : group_in_;
      pack_panel<K>(static_cast<const T*>(p_.weight) + g * group_out_ * inputs * taps_, group_out_, inputs,
                    taps_, first, weights_ + i * panel_units());
      const T* bias = static_cast<const T*>(p_.bias);
      for (int64_t o = 0; o < kPanel; ++o) {
        const bool live = bias && first + o < group_out_;
        biases_[i * kPanel + o] = live ? widen<A>(bias[g * group_out_ + first + o]) : A(0);
      }
    };
    constexpr int64_t kWorthThreads = 32768;
    if (count > 1 && count * panel_units() >= kWorthThreads) {
      parallel_for(count, pack);
    } else {
      for (int64_t i = 0; i < count; ++i) pack(i);
    }
  }

  int64_t pass_rows() const { return pass_rows_; }
  int64_t row_units() const { return packed_width_ * pixel_; }
  int64_t input_rows(int64_t rows) const {
    return (rows - 1) * p_.stride[0] + int64_t(p_.kernel[0] - 1) * p_.dilation[0] + 1;
  }
  int64_t packed_rows() const { return p_.height + 2 * int64_t(p_.padding[0]); }  // of an image
  // The packed row where an output row's window begins.
  int64_t first_row(int64_t output) const { return output * p_.stride[0]; }
  bool packs_apart() const { return true; }  // rows may be packed side by side by several threads
  // Pixels from one row of sums to the next.
  int64_t pitch() const { return p_.out_width; }
  // Units that packing `rows` input rows takes, and sums that a pass makes.
  int64_t plane_units(int64_t rows) const { return rows * row_units() + kOverRead; }
  int64_t packed_units(int64_t rows) const { return plane_units(rows); }
  int64_t pass_sums() const { return pass_rows_ * p_.out_width * kPanel; }

  // Input rows [first, first + rows) of image b, counted from the top of the padding, to row `at` of packed
  // memory.
  void pack(int64_t b, int64_t first, int64_t rows, Unit* memory, int64_t, int64_t at) const {
    Unit* packed = memory + at * row_units();
    const T* x = static_cast<const T*>(p_.x) + b * p_.x_stride[0] + p_.start * p_.x_stride[1];
    const int64_t side = p_.padding[1] * pixel_;
    for (int64_t r = 0; r < rows; ++r, packed += row_units()) {
      const int64_t y = first + r - p_.padding[0];
      if (y < 0 || y >= p_.height) {
        memset(packed, 0, size_t(row_units()) * sizeof(Unit));
        continue;
      }
      memset(packed, 0, size_t(side) * sizeof(Unit));
      memset(packed + side + p_.width * pixel_, 0, size_t(side) * sizeof(Unit));
      pack_row(x + y * p_.x_stride[2], packed + side);
    }
  }

  int64_t all_panels() const { return groups_ * panels(group_out_); }

  // Panels [begin, end) of at most pass_rows() output rows, from packed rows that begin at the first one
  // needed. Calls epilogue(first output channel, channels, sums [rows * out_width][kPanel]) for each.
  template <class Epilogue>
  void compute(int64_t rows, const Unit* packed, int64_t, A* sums, int64_t begin, int64_t end,
               const Epilogue& epilogue) const {
    Product<K> a{};
    a.step = p_.stride[1] * pixel_;
    a.run_step = p_.stride[0] * row_units();
    a.offset = offsets_;
    a.segments = segments();
    a.depth = merged_ * depth_;
    a.out = sums;
    a.runs = rows;
    a.pixels = p_.out_width;
    if (a.run_step == a.pixels * a.step) {  // rows that follow one another are one run
      a.pixels *= rows;
      a.runs = 1;
    }
    a.fetch_ahead = all_panels() * panel_units() * int64_t(sizeof(Unit)) > kSecondLevel;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t g = panel / panels(group_out_), first = panel % panels(group_out_) * kPanel;
      const int64_t live = least(kPanel, group_out_ - first);
      a.w = weights_ + panel * panel_units();
      a.bias = biases_ + panel * kPanel;
      if (depthwise_) {
        a.x = packed + first;
        depthwise(a, live);
      } else {
        a.x = packed + g * depth_;
        product(a, live);
      }
      epilogue(g * group_out_ + first, live, static_cast<const A*>(sums));
    }
  }

 private:
  static constexpr int64_t kOverRead = 64;  // units: the last vector of a pixel, where channels are lanes

  int64_t panel_units() const { return taps_ * depth_ * kPanel; }

  int64_t segments() const { return taps_ / merged_; }

  // A segment of the product is a tap, or where channels are few the taps of a kernel's row, which lie side
  // by side. The order of the sums is the same.
  static int64_t taps_of_segment(const PartialConv2dParams& p, int64_t depth) {
    constexpr int64_t kShort = 128;
    return p.groups == 1 && p.dilation[1] == 1 && p.kernel[1] * depth <= kShort ? p.kernel[1] : 1;
  }

  void pack_row(const T* x, Unit* packed) const {
    X* to = reinterpret_cast<X*>(packed);
    const int64_t group_elements = units<K>(group_in_) * K::kPair;
    const Pixels<const T> from{x, p_.x_stride[1], p_.x_stride[3]};
    if (group_elements == group_in_) {
      load_pixels(from, p_.width, p_.c_in, to, pixel_ * K::kPair);
      return;
    }
    for (int64_t g = 0; g < groups_; ++g) {
      const Pixels<const T> part{x + g * group_in_ * from.channel, from.channel, from.pixel};
      X* group = to + g * group_elements;
      load_pixels(part, p_.width, group_in_, group, pixel_ * K::kPair);
      for (int64_t i = 0; i < p_.width; ++i) group[i * pixel_ * K::kPair + group_in_] = X{};
    }
  }

  void depthwise(const Product<K>& a, int64_t live) const {
    if constexpr (K::kPair == 1) {
      for (int64_t c = 0; c < live; c += K::kLanes) {
        for (int64_t run = 0; run < a.runs; ++run) {
          const Unit* x = a.x + run * a.run_step + c;
          A* out = a.out + run * a.pixels * kPanel + c;
          int64_t i = 0;
          for (; i + 8 <= a.pixels; i += 8) depthwise_block<8>(a, x + i * a.step, out + i * kPanel, c);
          for (; i < a.pixels; ++i) depthwise_block<1>(a, x + i * a.step, out + i * kPanel, c);
        }
      }
    }
  }

  template <int kRows>
  TRANCHE_INLINE void depthwise_block(const Product<K>& a, const Unit* x, A* out, int64_t c) {
    typename K::V sum[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = K::load(a.bias + c);
    for (int64_t k = 0; k < a.segments; ++k) {
      const typename K::V w = K::load(a.w + k * kPanel + c);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r] = K::lanes(K::load(x + a.offset[k] + r * a.step), w, sum[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) K::store(out + r * kPanel, sum[r]);
  }

  const PartialConv2dParams& p_;
  const bool depthwise_;
  const int64_t groups_, group_in_, group_out_, depth_, taps_, merged_, pixel_, packed_width_;
  int64_t pass_rows_ = 1;
  int64_t* offsets_ = nullptr;
  Unit* weights_ = nullptr;
  A* biases_ = nullptr;
};

}  // namespace tranche::cpu::TRANCHE_ISA
