#include "bits/bits_fake_quantize.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {

namespace {

template <class T>
void launch_type(const BitsFakeQuantizeParams& p, void* stream) {
  const int64_t groups = p.rows * p.groups;
  const LaunchShape shape = {dim3(unsigned(groups < (1 << 20) ? groups : 1 << 20)), dim3(kFakeThreads)};
  if (p.grad) {
    launch("bits_fake_quantize_backward", bits_fake_quantize_kernel<T, true>, shape, stream, p);
  } else {
    launch("bits_fake_quantize", bits_fake_quantize_kernel<T, false>, shape, stream, p);
  }
}

}  // namespace

void bits_fake_quantize(const BitsFakeQuantizeParams& p, void* stream) {
  with_type<double, float, half, bf16>("bits_fake_quantize", p.type,
                                       [&](auto t) { launch_type<decltype(t)>(p, stream); });
}

}  // namespace tranche::cuda
