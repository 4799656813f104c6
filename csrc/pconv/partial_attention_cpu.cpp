// partial_attention on the CPU.
//
// norm and finish take some pixels of an image at a time, as rows of channels in the type that is computed
// in; a row's sums go lane by lane and by a fixed tree, so that its bits depend on the pixel alone. mix is
// that of partial_attention_mix_cpu.h.
#include "core/dispatch.h"
#include "core/isa.h"
#include "pconv/lanes_cpu.h"
#include "pconv/partial_attention_mix_cpu.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

constexpr int64_t kTaskPixels = 64, kBlockPixelsOfRows = 16;
constexpr int64_t kWorthThreads = 65536;  // elements

// The sum of what f adds for each 16 elements of a row, whose length is a multiple of that.
template <class A, class F>
TRANCHE_INLINE A sum_of_row(const A* row, int64_t n, const F& f) {
  typename LanesOf<A>::type x, sums = {};
  for (int64_t c = 0; c < n; c += kLanes) {
    __builtin_memcpy(&x, row + c, sizeof x);
    f(x, sums);
  }
  return sum_of<A>(sums);
}

// row = (row - mean) / sqrt(var + eps) of n elements, after which zeros fill up a multiple of 16.
template <class A>
TRANCHE_INLINE void normalise(A* row, int64_t n, A eps) {
  using Lanes = typename LanesOf<A>::type;
  const int64_t whole = round_up(n, kLanes);
  const A mean = sum_of_row<A>(row, whole, [](const Lanes& x, Lanes& sum) { sum += x; }) / A(n);
  for (int64_t c = n; c < whole; ++c) row[c] = mean;  // no distance from it
  const A square = sum_of_row<A>(row, whole, [&](const Lanes& x, Lanes& sum) {
    const Lanes apart = x - mean;
    sum += apart * apart;
  });
  const A scale = A(1) / A(__builtin_sqrt(square / A(n) + eps));
  for (int64_t c = 0; c < whole; c += kLanes) {
    Lanes x;
    __builtin_memcpy(&x, row + c, sizeof x);
    x = (x - mean) * scale;
    __builtin_memcpy(row + c, &x, sizeof x);
  }
}

// row += n elements of type T.
template <class T, class A>
TRANCHE_INLINE void add_row(A* row, const T* from, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (!__is_same(T, double)) {
    for (int64_t c = 0; c < n; c += 16) {
      vstore(row + c, vadd(vload(row + c), load16(from + c, int(least<int64_t>(16, n - c)))));
    }
    return;
  }
#endif
  for (int64_t c = 0; c < n; ++c) row[c] += widen<A>(from[c]);
}

template <class T>
class Rows {
  using A = typename compute_type<T>::type;

 public:
  Rows(const PartialAttentionParams& p, void* memory)
      : p_(p),
        n_(p.channels - p.start),
        step_(round_up(n_, kLanes)),
        pixels_(p.height * p.width),
        tasks_((pixels_ + kTaskPixels - 1) / kTaskPixels),
        slots_(p.batch * n_ * pixels_ < kWorthThreads ? 1 : least<int64_t>(num_threads(), p.batch * tasks_)),
        columns_(follow(p.x_stride) && follow(p.y_stride) ? pixels_ : p.width),
        arena_(memory),
        rows_(arena_.template take<A>(slots_ * kBlockPixelsOfRows * step_)) {}

  size_t bytes() const { return size_t(arena_.used()); }

  void norm() const {
    blocks([&](int64_t b, int64_t at, int64_t count, A* rows) {
      load(b, at, count, rows);
      for (int64_t i = 0; i < count; ++i) {
        A* row = rows + i * step_;
        for (int64_t c = n_; c < step_; ++c) row[c] = A(0);
        normalise(row, n_, A(p_.eps));
      }
      T* to = static_cast<T*>(p_.pixels) + (b * pixels_ + at) * n_;
      for (int64_t i = 0; i < count; ++i) store_row(rows + i * step_, to + i * n_, n_);
    });
  }

  void finish() const {
    blocks([&](int64_t b, int64_t at, int64_t count, A* rows) {
      pass(b, at, count);
      load(b, at, count, rows);
      const T* mixed = static_cast<const T*>(p_.products) + (b * pixels_ + at) * n_;
      for (int64_t i = 0; i < count; ++i) add_row(rows + i * step_, mixed + i * n_, n_);
      const int64_t to = place(p_.y_stride, b, at) + p_.start * p_.y_stride[1];
      store_pixels(rows, step_, count, n_,
                   Pixels<T>{static_cast<T*>(p_.y) + to, p_.y_stride[1], p_.y_stride[3]});
    });
  }

 private:
  // Whether an image's rows follow one another: they are one then.
  bool follow(const int64_t* stride) const { return p_.height == 1 || stride[2] == p_.width * stride[3]; }

  int64_t place(const int64_t* stride, int64_t b, int64_t pixel) const {
    return b * stride[0] + pixel / columns_ * stride[2] + pixel % columns_ * stride[3];
  }

  // f(image, pixel, count, rows for them) on neighbours in an image's row.
  template <class F>
  void blocks(const F& f) const {
    const auto task = [&](int64_t i, int64_t slot) {
      const int64_t b = i / tasks_, end = least(pixels_, (i % tasks_ + 1) * kTaskPixels);
      for (int64_t at = i % tasks_ * kTaskPixels, count; at < end; at += count) {
        count = least(kBlockPixelsOfRows, least(end - at, columns_ - at % columns_));
        f(b, at, count, rows_ + slot * kBlockPixelsOfRows * step_);
      }
    };
    const int64_t all = p_.batch * tasks_;
    if (slots_ > 1) {
      parallel_tasks(all, slots_, task);
    } else {
      for (int64_t i = 0; i < all; ++i) task(i, 0);
    }
  }

  void load(int64_t b, int64_t at, int64_t count, A* rows) const {
    const T* x = static_cast<const T*>(p_.x) + place(p_.x_stride, b, at) + p_.start * p_.x_stride[1];
    load_pixels(Pixels<const T>{x, p_.x_stride[1], p_.x_stride[3]}, count, n_, rows, step_);
  }

  // The channels before the attended ones.
  void pass(int64_t b, int64_t at, int64_t count) const {
    const T* x = static_cast<const T*>(p_.x) + place(p_.x_stride, b, at);
    T* y = static_cast<T*>(p_.y) + place(p_.y_stride, b, at);
    const int64_t *xs = p_.x_stride, *ys = p_.y_stride;
    if (xs[1] == 1 && ys[1] == 1) {
      for (int64_t i = 0; i < count; ++i) copy_row(x + i * xs[3], y + i * ys[3], p_.start);
    } else if (xs[3] == 1 && ys[3] == 1) {
      for (int64_t c = 0; c < p_.start; ++c) copy_row(x + c * xs[1], y + c * ys[1], count);
    } else {
      for (int64_t c = 0; c < p_.start; ++c) {
        for (int64_t i = 0; i < count; ++i) y[c * ys[1] + i * ys[3]] = x[c * xs[1] + i * xs[3]];
      }
    }
  }

  const PartialAttentionParams& p_;
  const int64_t n_, step_, pixels_, tasks_, slots_, columns_;
  Arena arena_;
  A* const rows_;
};

// f(kernel) with the kernel for the type of p's tensors.
template <template <class> class Kernel, class F>
auto with(const PartialAttentionParams& p, void* memory, const F& f) {
  return with_type<double, float, half, bf16>("partial_attention", p.type,
                                              [&](auto t) { return f(Kernel<decltype(t)>(p, memory)); });
}

}  // namespace

size_t partial_attention_workspace(const PartialAttentionParams& p) {
  const auto bytes = [](const auto& kernel) { return kernel.bytes(); };
  return most(with<Rows>(p, nullptr, bytes), with<Mix>(p, nullptr, bytes));
}

void partial_attention_norm(const PartialAttentionParams& p) {
  with<Rows>(p, p.workspace, [](const auto& rows) { rows.norm(); });
}

void partial_attention_mix(const PartialAttentionParams& p) {
  with<Mix>(p, p.workspace, [](const auto& mix) { mix.run(); });
}

void partial_attention_finish(const PartialAttentionParams& p) {
  with<Rows>(p, p.workspace, [](const auto& rows) { rows.finish(); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(size_t, partial_attention_workspace, PartialAttentionParams)
TRANCHE_CPU_ENTRY(void, partial_attention_norm, PartialAttentionParams)
TRANCHE_CPU_ENTRY(void, partial_attention_mix, PartialAttentionParams)
TRANCHE_CPU_ENTRY(void, partial_attention_finish, PartialAttentionParams)
