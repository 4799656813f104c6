// tranche::tree_merge_state: schema, checks, allocation.
#include "tree/tree_merge_state.h"

#include "core/torch_glue.h"

namespace tranche {
namespace {

std::tuple<Tensor, Tensor> tree_merge_state(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                            const Tensor& lse_b) {
  const TensorChecks check("tree_merge_state");
  check.dim("out_a", out_a, 4, "[B, N, Hq, D]");
#if defined(TRANCHE_BACKEND_CPU)
  check.dtype("out_a", out_a,
              {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
#else
  check.dtype("out_a", out_a, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
#endif
  check.last_contiguous("out_a", out_a);
  check.dim("out_b", out_b, 4, "[B, N, Hq, D]");
  check.dtype("out_b", out_b, {out_a.scalar_type()});
  check.same_device("out_b", out_b, "out_a", out_a);
  check.last_contiguous("out_b", out_b);
  check.same_sizes("out_b", out_b, "out_a", out_a, 4, "Both sides hold the same rows.");
  const int64_t batch = out_a.size(0), nodes = out_a.size(1), heads = out_a.size(2), head_dim = out_a.size(3);
  check.exactly("lse_a", lse_a, ScalarType::Float, {batch, nodes, heads}, "[B, N, Hq]", "out_a", out_a);
  check.exactly("lse_b", lse_b, ScalarType::Float, {batch, nodes, heads}, "[B, N, Hq]", "out_a", out_a);
  check.that(nodes <= INT32_MAX && heads <= INT32_MAX && head_dim <= INT32_MAX, "sizes below 2^31",
             shape_text(out_a), "Merge in parts.");

  Tensor out = empty_on(out_a, {batch, nodes, heads, head_dim}, out_a.scalar_type());
  Tensor lse = empty_on(out_a, {batch, nodes, heads}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};

  TreeMergeStateParams params{};
  params.out_a = out_a.const_data_ptr();
  params.lse_a = data<float>(lse_a);
  params.out_b = out_b.const_data_ptr();
  params.lse_b = data<float>(lse_b);
  params.out = out.mutable_data_ptr();
  params.lse = mutable_data<float>(lse);
  for (int i = 0; i < 3; ++i) {
    params.a_stride[i] = out_a.stride(i);
    params.b_stride[i] = out_b.stride(i);
  }
  params.rows = batch * nodes * heads;
  params.nodes = int32_t(nodes);
  params.heads = int32_t(heads);
  params.head_dim = int32_t(head_dim);
  params.type = dtype_of_tensor(out_a);
  RUN_KERNEL(tree_merge_state, params, out_a, lse_a, out_b, lse_b, out, lse);
  return {out, lse};
}

REGISTER_OP(tree_merge_state,
            "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)")

}  // namespace
}  // namespace tranche
