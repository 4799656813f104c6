// Group by group; a group's sum for its scale is in double, in one order.
#include "bits/bits_fake_quantize.h"

#include "bits/fake_quantize_cpu.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

template <class T, bool backward>
void one_group(const BitsFakeQuantizeParams& p, int64_t group) {
  using C = typename compute_type<T>::type;
  const WeightGrid<C> grid = weight_grid<C>(p.bits, p.stored_bits);
  const C scale = static_cast<const C*>(p.scale)[group];
  const T* w = static_cast<const T*>(p.w) + group * p.group_size;
  const T* grad = backward ? static_cast<const T*>(p.grad) + group * p.group_size : nullptr;
  T* out = static_cast<T*>(p.out) + group * p.group_size;
  LaneSums sums;
  C values[kFakeBlock] = {}, grads[kFakeBlock] = {}, results[kFakeBlock], terms[kFakeBlock];
  for (int64_t begin = 0; begin < p.group_size; begin += kFakeBlock) {
    const int n = p.group_size - begin < kFakeBlock ? int(p.group_size - begin) : kFakeBlock;
    load_block(w + begin, values, n);
    if constexpr (backward) {
      load_block(grad + begin, grads, n);
      for (int i = n; i < kFakeBlock; ++i) values[i] = grads[i] = 0;
    }
    for (int i = 0; i < kFakeBlock; ++i) {
      const GridWeight<C> on = weight_on_grid(values[i], scale, grid);
      if constexpr (backward) {
        results[i] = on.inside ? grads[i] : C(0);
        terms[i] = i < n ? grads[i] * on.slope : C(0);
      } else {
        results[i] = on.code * scale;
      }
    }
    store_block(out + begin, results, n);
    if constexpr (backward) sums.add(terms);
  }
  if constexpr (backward) static_cast<C*>(p.grad_scale)[group] = C(sums.total());
}

template <class T>
void all_groups(const BitsFakeQuantizeParams& p) {
  const auto one = [&p](int64_t group) {
    p.grad ? one_group<T, true>(p, group) : one_group<T, false>(p, group);
  };
  const int64_t groups = p.rows * p.groups;
  const bool worth_threads = groups * p.group_size >= 32768;  // some ten microseconds of one thread
  if (worth_threads) {
    parallel_for(groups, one);
  } else {
    for (int64_t group = 0; group < groups; ++group) one(group);
  }
}

}  // namespace

void bits_fake_quantize(const BitsFakeQuantizeParams& p) {
  with_type<double, float, half, bf16>("bits_fake_quantize", p.type,
                                       [&](auto t) { all_groups<decltype(t)>(p); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, bits_fake_quantize, BitsFakeQuantizeParams)
