#include "bits/bits_fake_quantize_activations.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {

namespace {

template <class T>
void launch_type(const BitsFakeQuantizeActivationsParams& p, void* stream) {
  const LaunchShape shape = {dim3(unsigned(p.chunks < (1 << 20) ? p.chunks : 1 << 20)), dim3(kFakeThreads)};
  if (!p.grad) {
    launch("bits_fake_quantize_activations", bits_fake_quantize_activations_kernel<T, false>, shape, stream,
           p);
    return;
  }
  using C = typename compute_type<T>::type;
  launch("bits_fake_quantize_activations_backward", bits_fake_quantize_activations_kernel<T, true>, shape,
         stream, p);
  launch("bits_fake_quantize_activations_sum", bits_fake_quantize_activations_sum_kernel<C>,
         {dim3(1), dim3(kFakeThreads)}, stream, p);
}

}  // namespace

void bits_fake_quantize_activations(const BitsFakeQuantizeActivationsParams& p, void* stream) {
  with_type<double, float, half, bf16>("bits_fake_quantize_activations", p.type,
                                       [&](auto t) { launch_type<decltype(t)>(p, stream); });
}

}  // namespace tranche::cuda
