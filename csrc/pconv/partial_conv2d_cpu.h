// The slice of some input rows, packed with its zero padding; the products over it; the results' way into y.
//
// A packed row is [width + 2 padding][c_in] in the type of the sums. With stride 1 the pixels of several rows
// are then equally spaced, padding included, and one product runs over all of them: what it computes between
// rows is dropped.
#pragma once

#include <cstring>

#include "core/parallel.h"
#include "pconv/partial_conv2d.h"
#include "pconv/product_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

constexpr int64_t kSlack = 64;  // elements that a packed row may be over-read by

TRANCHE_INLINE int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
TRANCHE_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
TRANCHE_INLINE int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }

// How the work is cut. Nothing in here changes a result.
struct ConvPlan {
  bool depthwise;                        // a channel each: vector lanes are channels, and there is one group
  int64_t groups;                        // that are computed one after the other
  int64_t slice_k, group_out, ldw, ldo;  // per group: products, outputs, padded outputs; all groups' columns
  int64_t packed_width, row_reach;       // of a packed row; input rows that one output row needs
  int64_t chunk_rows, chunks;            // output rows of a task, tasks of an image
  int64_t weights, biases, offsets, slot;  // elements: of all groups; of one thread's scratch
  int64_t packed, results;                 // elements: of a task's packed rows, of its results
  int64_t whole;                           // elements of all images packed, where that has to come first
  int64_t slots;
};

TRANCHE_INLINE int64_t packed_rows(const PartialConv2dParams& p, const ConvPlan& plan, int64_t out_rows) {
  return out_rows <= 0 ? 0 : (out_rows - 1) * p.stride[0] + plan.row_reach;
}

TRANCHE_INLINE int64_t result_rows(const PartialConv2dParams& p, const ConvPlan& plan, int64_t out_rows) {
  const bool one_run = p.stride[0] == 1 && p.stride[1] == 1;
  return one_run ? (out_rows - 1) * plan.packed_width + p.out_width : out_rows * p.out_width;
}

static ConvPlan conv_plan(const PartialConv2dParams& p) {
  ConvPlan plan{};
  plan.slice_k = int64_t(p.c_in / p.groups) * p.kernel[0] * p.kernel[1];
  plan.depthwise = p.c_in == p.groups && p.c_out == p.groups && p.groups > 1;
  plan.groups = plan.depthwise ? 1 : p.groups;
  plan.group_out = p.c_out / plan.groups;
  plan.ldw = padded(plan.group_out);
  plan.ldo = plan.groups == 1 ? plan.ldw : p.c_out + kColumnPad;
  plan.packed_width = p.width + 2 * int64_t(p.padding[1]);
  plan.row_reach = int64_t(p.kernel[0] - 1) * p.dilation[0] + 1;
  const int64_t threads = num_threads();
  const bool image_tasks = p.in_place && p.batch >= threads;
  // About 256 KB of scratch per task, and at least two tasks per thread.
  const int64_t row_bytes = 4 * plan.packed_width * (p.c_in * int64_t(p.stride[0]) + plan.ldo);
  plan.chunk_rows = most(1, least(p.out_height, (256 << 10) / most(row_bytes, 1)));
  if (image_tasks) {
    plan.chunk_rows = p.out_height;
  } else {
    const int64_t wanted = (2 * threads + p.batch - 1) / most(p.batch, 1);
    plan.chunk_rows = most(1, least(plan.chunk_rows, (p.out_height + wanted - 1) / wanted));
  }
  plan.chunks = (p.out_height + plan.chunk_rows - 1) / most(plan.chunk_rows, 1);
  plan.weights = plan.groups * plan.slice_k * plan.ldw;
  plan.biases = plan.groups * plan.ldw;
  plan.offsets = plan.slice_k;
  plan.packed = packed_rows(p, plan, plan.chunk_rows) * plan.packed_width * p.c_in + kSlack;
  plan.results = result_rows(p, plan, plan.chunk_rows) * plan.ldo + kSlack;
  const int64_t all_rows = p.height + 2 * int64_t(p.padding[0]);
  plan.whole = p.in_place && !image_tasks ? p.batch * all_rows * plan.packed_width * p.c_in + kSlack : 0;
  plan.slot = rounded_up(plan.packed + plan.results, 16);
  plan.slots = most(1, least(threads, p.batch * plan.chunks));
  return plan;
}

// Where the parts of the workspace lie, in elements of A.
template <class A>
struct ConvSpace {
  A *weights, *biases, *whole, *slots;
  int64_t* offsets;
  ConvSpace(const PartialConv2dParams& p, const ConvPlan& plan) {
    offsets = static_cast<int64_t*>(p.workspace);
    weights = reinterpret_cast<A*>(offsets + rounded_up(plan.offsets, 8));
    biases = weights + plan.weights;
    whole = biases + plan.biases;
    slots = whole + rounded_up(plan.whole, 16);
  }
};

static size_t conv_workspace(const PartialConv2dParams& p, size_t element) {
  const ConvPlan plan = conv_plan(p);
  return size_t(rounded_up(plan.offsets, 8)) * sizeof(int64_t) +
         size_t(plan.weights + plan.biases + rounded_up(plan.whole, 16) + plan.slots * plan.slot) * element;
}

template <class T, class A>
class Convolution {
 public:
  Convolution(const PartialConv2dParams& p, const ConvPlan& plan) : p_(p), plan_(plan), space_(p, plan) {}

  // The weights of all groups, transposed, and where each product finds its element of x.
  void prepare() const {
    const int64_t cells = int64_t(p_.kernel[0]) * p_.kernel[1];
    for (int64_t k = 0; k < plan_.slice_k; ++k) {
      const int64_t ci = k / cells, ky = k % cells / p_.kernel[1], kx = k % p_.kernel[1];
      space_.offsets[k] = (ky * p_.dilation[0] * plan_.packed_width + kx * p_.dilation[1]) * p_.c_in + ci;
    }
    const int64_t blocks = plan_.ldw / kColumnPad, group_weights = plan_.group_out * plan_.slice_k;
    const auto pack = [&](int64_t task) {
      const int64_t g = task / blocks, first = task % blocks * kColumnPad;
      pack_columns(static_cast<const T*>(p_.weight) + g * group_weights, plan_.group_out, plan_.slice_k,
                   first, space_.weights + g * plan_.slice_k * plan_.ldw, plan_.ldw);
    };
    const bool worth_threads = plan_.weights >= 16384;
    if (worth_threads) {
      parallel_for(plan_.groups * blocks, pack);
    } else {
      for (int64_t task = 0; task < plan_.groups * blocks; ++task) pack(task);
    }
    for (int64_t g = 0; g < plan_.groups; ++g) {
      const T* bias = static_cast<const T*>(p_.bias);
      pack_bias(bias ? bias + g * plan_.group_out : nullptr, plan_.group_out, space_.biases + g * plan_.ldw);
    }
  }

  // Input rows [first, first + rows) of image b, counted from the top of the padding.
  void pack(int64_t b, int64_t first, int64_t rows, A* to) const {
    const T* x = static_cast<const T*>(p_.x) + b * p_.x_stride[0] + p_.start * p_.x_stride[1];
    const int64_t channels = p_.c_in, side = p_.padding[1] * channels;
    for (int64_t r = 0; r < rows; ++r, to += plan_.packed_width * channels) {
      const int64_t y = first + r - p_.padding[0];
      if (y < 0 || y >= p_.height) {
        memset(to, 0, size_t(plan_.packed_width * channels) * sizeof(A));
        continue;
      }
      memset(to, 0, size_t(side) * sizeof(A));
      memset(to + side + p_.width * channels, 0, size_t(side) * sizeof(A));
      pack_row(x + y * p_.x_stride[2], to + side);
    }
  }

  // Output rows [first, first + rows) of image b from packed rows that begin at the first one needed.
  void compute(int64_t b, int64_t first, int64_t rows, const A* packed, A* results) const {
    const bool one_run = p_.stride[0] == 1 && p_.stride[1] == 1;
    const int64_t group_in = p_.c_in / plan_.groups;
    const int64_t runs = one_run ? 1 : rows;
    const int64_t run_pixels = one_run ? result_rows(p_, plan_, rows) : p_.out_width;
    const int64_t line = one_run ? plan_.packed_width : p_.out_width;
    for (int64_t g = 0; g < plan_.groups; ++g) {
      for (int64_t r = 0; r < runs; ++r) {
        const A* x = packed + r * p_.stride[0] * plan_.packed_width * p_.c_in + g * group_in;
        A* out = results + r * p_.out_width * plan_.ldo + g * plan_.group_out;
        if (plan_.depthwise) {
          depthwise(x, out, run_pixels);
          continue;
        }
        const Product<A> a{x,
                           p_.stride[1] * int64_t(p_.c_in),
                           space_.offsets,
                           plan_.slice_k,
                           space_.weights + g * plan_.slice_k * plan_.ldw,
                           space_.biases + g * plan_.ldw,
                           out,
                           plan_.ldw,
                           plan_.ldo};
        product(a, run_pixels, plan_.group_out);
      }
    }
    copy_untouched(b, first, rows);
    store(b, first, rows, results, line);
  }

  void run() const {
    prepare();
    const int64_t tasks = p_.batch * plan_.chunks;
    const int64_t all_rows = p_.height + 2 * int64_t(p_.padding[0]);
    const int64_t row_elements = plan_.packed_width * p_.c_in;
    if (plan_.whole > 0) {
      parallel_for(p_.batch * all_rows,
                   [&](int64_t i) { pack(i / all_rows, i % all_rows, 1, space_.whole + i * row_elements); });
    }
    parallel_for(plan_.slots, [&](int64_t slot) {
      A* packed = space_.slots + slot * plan_.slot;
      A* results = packed + plan_.packed;
      for (int64_t task = slot; task < tasks; task += plan_.slots) {
        const int64_t b = task / plan_.chunks, first = task % plan_.chunks * plan_.chunk_rows;
        const int64_t rows = least(plan_.chunk_rows, p_.out_height - first);
        const A* from = packed;
        if (plan_.whole > 0) {
          from = space_.whole + (b * all_rows + first * p_.stride[0]) * row_elements;
        } else {
          pack(b, first * p_.stride[0], packed_rows(p_, plan_, rows), packed);
        }
        compute(b, first, rows, from, results);
      }
    });
  }

 private:
  void pack_row(const T* x, A* to) const {
    const int64_t channels = p_.c_in;
    if (p_.x_stride[1] == 1) {
      for (int64_t i = 0; i < p_.width; ++i) load_row(x + i * p_.x_stride[3], to + i * channels, channels);
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const T* plane = x + c * p_.x_stride[1];
      for (int64_t i = 0; i < p_.width; ++i) to[i * channels + c] = widen<T, A>(plane[i * p_.x_stride[3]]);
    }
  }

  void depthwise(const A* x, A* out, int64_t pixels) const {
    using L = Lanes<A>;
    const int64_t step = p_.stride[1] * int64_t(p_.c_in);
    for (int64_t i = 0; i < pixels; ++i) {
      for (int64_t c = 0; c < p_.c_out; c += L::width) {
        typename L::V sum = L::load(space_.biases + c);
        for (int64_t k = 0; k < plan_.slice_k; ++k) {
          // the last vector of a pixel reads into the next one, or into the slack, and drops it
          const typename L::V at = L::load(x + i * step + space_.offsets[k] + c);
          sum = L::fma(at, L::load(space_.weights + k * plan_.ldw + c), sum);
        }
        L::store(out + i * plan_.ldo + c, sum);
      }
    }
  }

  // The channels of x beside the slice. Where pixels are whole, the slice travels along and is overwritten.
  void copy_untouched(int64_t b, int64_t first, int64_t rows) const {
    if (!p_.copies) return;
    const T* x = static_cast<const T*>(p_.x) + b * p_.x_stride[0];
    T* y = static_cast<T*>(p_.y) + b * p_.y_stride[0];
    const int64_t *xs = p_.x_stride, *ys = p_.y_stride;
    const bool whole_pixels = xs[1] == 1 && ys[1] == 1 && xs[3] == p_.channels && ys[3] == p_.channels;
    if (whole_pixels) {
      for (int64_t r = first; r < first + rows; ++r) {
        memcpy(y + r * ys[2], x + r * xs[2], size_t(p_.width * p_.channels) * sizeof(T));
      }
      return;
    }
    const bool planes = xs[3] == 1 && ys[3] == 1 && xs[2] == p_.width && ys[2] == p_.width;
    for (int64_t c = 0; c < p_.channels; ++c) {
      if (c >= p_.start && c < p_.start + p_.c_in) continue;
      if (planes) {
        memcpy(y + c * ys[1] + first * ys[2], x + c * xs[1] + first * xs[2],
               size_t(rows * p_.width) * sizeof(T));
        continue;
      }
      for (int64_t r = first; r < first + rows; ++r) {
        for (int64_t i = 0; i < p_.width; ++i) {
          y[c * ys[1] + r * ys[2] + i * ys[3]] = x[c * xs[1] + r * xs[2] + i * xs[3]];
        }
      }
    }
  }

  void store(int64_t b, int64_t first, int64_t rows, const A* results, int64_t line) const {
    const int64_t* ys = p_.y_stride;
    T* y = static_cast<T*>(p_.y) + b * ys[0] + p_.y_start * ys[1];
    for (int64_t r = 0; r < rows; ++r) {
      T* row = y + (first + r) * ys[2];
      const A* from = results + r * line * plan_.ldo;
      if (ys[1] == 1) {
        for (int64_t i = 0; i < p_.out_width; ++i) store_row(from + i * plan_.ldo, row + i * ys[3], p_.c_out);
        continue;
      }
      for (int64_t o = 0; o < p_.c_out; ++o) {
        for (int64_t i = 0; i < p_.out_width; ++i) {
          row[o * ys[1] + i * ys[3]] = narrow<T, A>(from[i * plan_.ldo + o]);
        }
      }
    }
  }

  const PartialConv2dParams& p_;
  const ConvPlan& plan_;
  const ConvSpace<A> space_;
};

}  // namespace tranche::cpu::TRANCHE_ISA
