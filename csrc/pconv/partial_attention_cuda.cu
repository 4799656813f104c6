#include "pconv/partial_attention.cuh"

#include "core/dispatch.h"

namespace tranche::cuda {
namespace {

using Traits = PartialAttentionTraits;

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > INT32_MAX) throw std::runtime_error("tranche: partial_attention: more than 2^31 - 1 blocks");
  return unsigned(blocks);
}

// Blocks that make 32 * kOwn channels of a head.
template <class T, int kOwn>
void launch_mix(const PartialAttentionParams& p, void* stream) {
  const int64_t pixels = p.height * p.width, tiles = (pixels + Traits::kQueries - 1) / Traits::kQueries;
  const int64_t dim = (p.channels - p.start) / p.heads;
  launch("partial_attention_mix", partial_attention_mix_kernel<T, kOwn>,
         {dim3(blocks_for(int64_t(p.batch) * p.heads * tiles, 1), blocks_for(dim, 32 * kOwn)),
          dim3(Traits::kThreads)},
         stream, p);
}

}  // namespace

size_t partial_attention_workspace(const PartialAttentionParams&) { return 0; }

void partial_attention_norm(const PartialAttentionParams& p, void* stream) {
  with_type<float, half, bf16>("partial_attention", p.type, [&](auto t) {
    launch("partial_attention_norm", partial_attention_norm_kernel<decltype(t)>,
           {dim3(blocks_for(int64_t(p.batch) * p.height * p.width, Traits::kPixels)), dim3(Traits::kThreads)},
           stream, p);
  });
}

void partial_attention_mix(const PartialAttentionParams& p, void* stream) {
  with_type<float, half, bf16>("partial_attention", p.type, [&](auto t) {
    using T = decltype(t);
    const int64_t dim = (p.channels - p.start) / p.heads;
    dim <= 64    ? launch_mix<T, 2>(p, stream)
    : dim <= 128 ? launch_mix<T, 4>(p, stream)
                 : launch_mix<T, 8>(p, stream);
  });
}

void partial_attention_finish(const PartialAttentionParams& p, void* stream) {
  with_type<float, half, bf16>("partial_attention", p.type, [&](auto t) {
    launch("partial_attention_finish", partial_attention_finish_kernel<decltype(t)>,
           {dim3(blocks_for(int64_t(p.batch) * p.channels * p.height * p.width, Traits::kThreads)),
            dim3(Traits::kThreads)},
           stream, p);
  });
}

}  // namespace tranche::cuda
