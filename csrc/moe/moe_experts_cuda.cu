#include "moe/moe_experts.cuh"

namespace tranche::cuda {
namespace {

template <class T, class W, int kColumnTiles>
void run(const MoeExpertsParams& p, void* stream) {
  using Traits = MoeExpertsTraits;
  const int features = p.gate.data ? Traits::kRows / 2 : Traits::kRows;
  const size_t partial = Traits::kPartialFloats<8 * kColumnTiles> * sizeof(float);
  const LaunchShape gate_up{dim3(unsigned((p.inner + features - 1) / features), unsigned(p.experts)),
                            dim3(Traits::kThreads), partial};
  launch("moe_gate_up", moe_gate_up_kernel<T, W, kColumnTiles>, gate_up, stream, p);
  const unsigned row_blocks = unsigned((p.hidden + Traits::kRows - 1) / Traits::kRows);
  const unsigned token_blocks = unsigned((p.tokens + Traits::kTokens - 1) / Traits::kTokens);
  const LaunchShape down{dim3(row_blocks, token_blocks), dim3(Traits::kThreads),
                         partial + size_t(p.outputs) * Traits::kTokens * Traits::kRows * sizeof(float)};
  launch("moe_down", moe_down_kernel<T, W, kColumnTiles>, down, stream, p);
}

template <class T>
void run(const MoeExpertsParams& p, void* stream) {
  // An expert has at most as many columns as there are tokens; fewer tiles leave registers for more blocks.
  // The order of every sum is the same in both.
  const bool few_tokens = p.tokens <= 16;
  if (p.up.scale) {
    return few_tokens ? run<T, int8_t, 2>(p, stream) : run<T, int8_t, 8>(p, stream);
  }
  return few_tokens ? run<T, T, 2>(p, stream) : run<T, T, 8>(p, stream);
}

}  // namespace

size_t moe_experts_workspace(const MoeExpertsParams& p) {
  return size_t(p.tokens) * size_t(p.top_k) * size_t(h_stride(p)) * (p.type == DType::f32 ? 4 : 2);
}

void moe_experts(const MoeExpertsParams& p, void* stream) {
  switch (p.type) {
    case DType::f32:
      return run<float>(p, stream);
    case DType::f16:
      return run<half>(p, stream);
    case DType::bf16:
      return run<bf16>(p, stream);
    default:
      throw std::runtime_error("tranche: moe_experts: expected float32, float16 or bfloat16");
  }
}

}  // namespace tranche::cuda
