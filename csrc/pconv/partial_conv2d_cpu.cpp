// The convolutions of the family on the CPU, compiled once per instruction set.
//
// A task is some output rows of an image. In place it is a whole image if there are images enough, packed as
// a whole before its first output is written; otherwise all slices are packed before any output is. They are
// too where outputs are few pixels of many channels: a task is some of the channels then, so that each weight
// is read once.
#include "pconv/partial_conv2d_cpu.h"
#include "core/dispatch.h"
#include "core/isa.h"
#if defined(__AMX_BF16__)
#include "pconv/partial_conv2d_tiles_cpu.h"
#endif

namespace tranche::cpu::TRANCHE_ISA {

namespace {

template <class T, class Convolution>
class PartialConvolution {
  using A = typename Convolution::A;
  using Unit = typename Convolution::Unit;

 public:
  PartialConvolution(const PartialConv2dParams& p, void* memory) : p_(p), conv_(p), arena_(memory) {
    const int64_t threads = num_threads();
    const bool image_tasks = p.in_place && (p.batch >= threads || !conv_.packs_apart());
    const int64_t weights_of_output = int64_t(p.c_in) / p.groups * p.kernel[0] * p.kernel[1];
    const int64_t few_pixels = weights_of_output * p.c_out / Convolution::kSharedWeights;
    by_channel_ =
        !p.in_place && !p.copies && conv_.packs_apart() && p.batch * p.out_height * p.out_width <= few_pixels;
    packs_first_ = by_channel_ || (p.in_place && !image_tasks);
    task_rows_ = p.out_height;
    if (!image_tasks) {
      // What a task packs stays in the second-level cache. Two tasks per thread at least, and eight where
      // passes are that many: a thread that is late holds the others up for no more than one.
      constexpr int64_t kPackedBytes = 512 << 10;
      const int64_t passes = p.batch * ((p.out_height + conv_.pass_rows() - 1) / conv_.pass_rows());
      const int64_t all = round_up(most(2 * threads, least(8 * threads, passes)), threads);
      const int64_t wanted = (all + p.batch - 1) / p.batch;
      const int64_t fitting = kPackedBytes / (conv_.packed_units(1) * int64_t(sizeof(Unit)));
      const int64_t most_rows = most<int64_t>(1, least(task_rows_, most(conv_.pass_rows(), fitting)));
      const int64_t tasks = round_up((p.out_height + most_rows - 1) / most_rows, wanted);
      task_rows_ = most<int64_t>(1, (p.out_height + tasks - 1) / tasks);
    }
    tasks_ = (p.out_height + task_rows_ - 1) / task_rows_;
    // One thread has multiplied fewer weights before another would begin.
    constexpr int64_t kWorthThreads = 1 << 16;
    const int64_t sharers = weights_of_output * p.c_out < kWorthThreads ? 1 : threads;
    slots_ = by_channel_ ? sharers : least(threads, p.batch * tasks_);
    Arena packed(p.packed), &weights = p.packed ? packed : arena_;
    conv_.take_weights(weights);
    packed_bytes_ = weights.used();
    conv_.take(arena_);
    const int64_t rows = packs_first_ ? p.batch * conv_.packed_rows() : conv_.input_rows(task_rows_);
    plane_ = conv_.plane_units(rows);
    packed_step_ = packs_first_ ? 0 : round_up(conv_.packed_units(rows), 16);
    packed_ = arena_.template take<Unit>(packs_first_ ? conv_.packed_units(rows) : slots_ * packed_step_);
    sums_ = arena_.template take<A>(slots_ * conv_.pass_sums());
  }

  size_t bytes() const { return size_t(arena_.used()); }
  size_t packed_bytes() const { return size_t(packed_bytes_); }
  void prepare_weights() const { conv_.prepare_weights(); }

  void run() const {
    conv_.prepare();
    if (!p_.packed) prepare_weights();
    const int64_t height = conv_.packed_rows();
    if (packs_first_) {
      parallel_for(p_.batch * height,
                   [&](int64_t i) { conv_.pack(i / height, i % height, 1, packed_, plane_, i); });
    }
    if (by_channel_) {
      parallel_shares(conv_.all_panels(), slots_, [&](int64_t begin, int64_t end, int64_t slot) {
        for (int64_t b = 0; b < p_.batch; ++b) {
          for (int64_t r = 0; r < p_.out_height; r += conv_.pass_rows()) {
            const Unit* packed = packed_ + (b * height + conv_.first_row(r)) * conv_.row_units();
            pass(b, r, least(conv_.pass_rows(), p_.out_height - r), packed, sums_ + slot * conv_.pass_sums(),
                 begin, end);
          }
        }
      });
      return;
    }
    parallel_tasks(p_.batch * tasks_, slots_, [&](int64_t task, int64_t slot) {
      const int64_t b = task / tasks_, first = task % tasks_ * task_rows_;
      const int64_t rows = least(task_rows_, p_.out_height - first), first_row = conv_.first_row(first);
      Unit* memory = packed_ + slot * packed_step_;
      const Unit* packed = packs_first_ ? memory + (b * height + first_row) * conv_.row_units() : memory;
      int64_t done = 0, copied = 0;  // rows of this task's that are packed, and passed through
      for (int64_t r = 0; r < rows; r += conv_.pass_rows()) {
        const int64_t count = least(conv_.pass_rows(), rows - r);
        // in place all of an image is packed before its first output
        const int64_t needed =
            p_.in_place ? conv_.input_rows(rows) : conv_.first_row(r) + conv_.input_rows(count);
        // Copying reads x in order; packing then finds the slice in the cache.
        const int64_t reached = least(rows, most(r + count, first_row + needed - p_.padding[0] - first));
        copy_untouched(b, first + copied, reached - copied);
        copied = reached;
        if (!packs_first_ && needed > done) {
          conv_.pack(b, first_row + done, needed - done, memory, plane_, done);
          done = needed;
        }
        pass(b, first + r, count, packed + conv_.first_row(r) * conv_.row_units(),
             sums_ + slot * conv_.pass_sums(), 0, conv_.all_panels());
      }
    });
  }

 private:
  // Panels [begin, end) of output rows [first, first + rows).
  void pass(int64_t b, int64_t first, int64_t rows, const Unit* packed, A* sums, int64_t begin,
            int64_t end) const {
    T* y = static_cast<T*>(p_.y) + b * p_.y_stride[0] + first * p_.y_stride[2];
    const auto store = [&](int64_t channel, int64_t channels, const A* from) {
      for (int64_t r = 0; r < rows; ++r) {
        T* to = y + (p_.y_start + channel) * p_.y_stride[1] + r * p_.y_stride[2];
        store_pixels(from + r * conv_.pitch() * kPanel, kPanel, p_.out_width, channels,
                     Pixels<T>{to, p_.y_stride[1], p_.y_stride[3]});
      }
    };
    conv_.compute(rows, packed, plane_, sums, begin, end, store);
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

  const PartialConv2dParams& p_;
  Convolution conv_;
  Arena arena_;
  bool packs_first_ = false, by_channel_ = false;
  int64_t task_rows_ = 1, tasks_ = 1, slots_ = 1, packed_step_ = 0, plane_ = 0, packed_bytes_ = 0;
  Unit* packed_ = nullptr;
  A* sums_ = nullptr;
};

// A convolution of single pixels knows no images: where they lie one after the other they are the rows of
// one.
PartialConv2dParams joined(PartialConv2dParams p) {
  const bool pixelwise =
      p.kernel[0] * p.kernel[1] == 1 && p.stride[0] * p.stride[1] == 1 && p.padding[0] + p.padding[1] == 0;
  const auto follow = [&](const int64_t* stride) {
    return p.height == 1 || stride[0] == p.height * stride[2];
  };
  if (!pixelwise || p.in_place || !follow(p.x_stride) || !follow(p.y_stride)) return p;
  if (p.height == 1) p.x_stride[2] = p.x_stride[0], p.y_stride[2] = p.y_stride[0];
  p.height = p.out_height = p.batch * p.height;
  p.batch = 1;
  return p;
}

// f(convolution) with the arithmetic that serves p.
template <class F>
auto with_convolution(const PartialConv2dParams& p, void* memory, const F& f) {
  return with_type<double, float, half, bf16>("partial_conv2d", p.type, [&](auto t) {
    using T = decltype(t);
    using Kind = typename KindOf<T>::type;
#if defined(__AMX_BF16__)
    if constexpr (PlanesOf<T>::value > 0) {
      if (TileConvolution<T>::serves(p)) return f(PartialConvolution<T, TileConvolution<T>>(p, memory));
    }
#endif
    if constexpr (Kind::kPair > 1) {
      if (is_depthwise(p)) return f(PartialConvolution<T, SliceConvolution<T, F32>>(p, memory));
    }
    return f(PartialConvolution<T, SliceConvolution<T, Kind>>(p, memory));
  });
}

}  // namespace

size_t partial_conv2d_workspace(const PartialConv2dParams& p) {
  return with_convolution(joined(p), nullptr, [](const auto& convolution) { return convolution.bytes(); });
}

size_t partial_conv2d_packed_bytes(const PartialConv2dParams& p) {
  return with_convolution(p, nullptr, [](const auto& convolution) { return convolution.packed_bytes(); });
}

void partial_conv2d_pack(const PartialConv2dParams& p) {
  with_convolution(p, p.workspace, [](const auto& convolution) { convolution.prepare_weights(); });
}

void partial_conv2d(const PartialConv2dParams& p) {
  with_convolution(joined(p), p.workspace, [](const auto& convolution) { convolution.run(); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, partial_conv2d_workspace, PartialConv2dParams)
TRANCHE_CPU_ENTRY(size_t, partial_conv2d_packed_bytes, PartialConv2dParams)
TRANCHE_CPU_ENTRY(void, partial_conv2d_pack, PartialConv2dParams)
TRANCHE_CPU_ENTRY(void, partial_conv2d, PartialConv2dParams)
