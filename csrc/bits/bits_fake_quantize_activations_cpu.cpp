// Chunk by chunk, whose sums for scale and zero are then added in order.
#include "bits/bits_fake_quantize_activations.h"

#include "bits/fake_quantize_cpu.h"
#include "core/dispatch.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace tranche::cpu::TRANCHE_ISA {

namespace {

template <class T, bool backward>
void one_chunk(const BitsFakeQuantizeActivationsParams& p, int64_t chunk) {
  using C = typename compute_type<T>::type;
  const C scale = *static_cast<const C*>(p.scale), top = C((1 << p.bits) - 1);
  const C zero = p.zero ? *static_cast<const C*>(p.zero) : C(0);
  const int64_t first = chunk * kFakeChunk, end = first + kFakeChunk < p.count ? first + kFakeChunk : p.count;
  LaneSums scale_sums, zero_sums;
  C values[kFakeBlock] = {}, grads[kFakeBlock] = {}, results[kFakeBlock], by_scale[kFakeBlock],
    by_zero[kFakeBlock];
  for (int64_t begin = first; begin < end; begin += kFakeBlock) {
    const int n = end - begin < kFakeBlock ? int(end - begin) : kFakeBlock;
    load_block(static_cast<const T*>(p.x) + begin, values, n);
    if constexpr (backward) {
      load_block(static_cast<const T*>(p.grad) + begin, grads, n);
      for (int i = n; i < kFakeBlock; ++i) values[i] = grads[i] = 0;
    }
    for (int i = 0; i < kFakeBlock; ++i) {
      const GridActivation<C> on = activation_on_grid(values[i], scale, zero, top);
      if constexpr (backward) {
        results[i] = on.inside ? grads[i] : C(0);
        by_scale[i] = i < n ? grads[i] * on.by_scale : C(0);
        by_zero[i] = i < n ? grads[i] * on.by_zero : C(0);
      } else {
        results[i] = on.value;
      }
    }
    store_block(static_cast<T*>(p.out) + begin, results, n);
    if constexpr (backward) {
      scale_sums.add(by_scale);
      zero_sums.add(by_zero);
    }
  }
  if constexpr (backward) {
    static_cast<double*>(p.partial)[2 * chunk] = scale_sums.total();
    static_cast<double*>(p.partial)[2 * chunk + 1] = zero_sums.total();
  }
}

template <class T>
void all_chunks(const BitsFakeQuantizeActivationsParams& p) {
  parallel_for(p.chunks, [&p](int64_t chunk) {
    p.grad ? one_chunk<T, true>(p, chunk) : one_chunk<T, false>(p, chunk);
  });
  if (!p.grad) return;
  using C = typename compute_type<T>::type;
  double by_scale = 0, by_zero = 0;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
    by_scale += static_cast<const double*>(p.partial)[2 * chunk];
    by_zero += static_cast<const double*>(p.partial)[2 * chunk + 1];
  }
  *static_cast<C*>(p.grad_scale) = C(by_scale);
  *static_cast<C*>(p.grad_zero) = C(by_zero);
}

}  // namespace

void bits_fake_quantize_activations(const BitsFakeQuantizeActivationsParams& p) {
  with_type<double, float, half, bf16>("bits_fake_quantize_activations", p.type,
                                       [&](auto t) { all_chunks<decltype(t)>(p); });
}

}  // namespace tranche::cpu::TRANCHE_ISA

TRANCHE_CPU_ENTRY(void, bits_fake_quantize_activations, BitsFakeQuantizeActivationsParams)
