// tranche::tree_attention_backward: schema, checks, allocation.
#include "tree/tree_attention_backward.h"

#include "core/torch_glue.h"
#include "tree/tree_attention_arguments.h"

namespace tranche {
namespace {

void check_gradients(const TensorChecks& check, const TreeAttentionArguments& a, const Tensor& grad_out,
                     const std::optional<Tensor>& grad_lse, const Tensor& out, const Tensor& lse) {
  check.that(a.k_cache.scalar_type() == a.q.scalar_type(),
             concat("caches of dtype ", dtype_text(a.q.scalar_type())), dtype_text(a.k_cache.scalar_type()),
             "Gradients need caches of q's dtype: convert them with k_cache.to(q.dtype) * k_scale[:, None].");
  const std::initializer_list<int64_t> rows = {a.batch(), a.nodes(), a.heads_q()};
  const std::initializer_list<int64_t> whole = {a.batch(), a.nodes(), a.heads_q(), a.head_dim()};
  check.exactly("grad_out", grad_out, a.q.scalar_type(), whole, "[B, N, Hq, D]", "q", a.q);
  check.exactly("out", out, a.q.scalar_type(), whole, "[B, N, Hq, D]", "q", a.q);
  check.exactly("lse", lse, ScalarType::Float, rows, "[B, N, Hq]", "q", a.q);
  if (grad_lse) check.exactly("grad_lse", *grad_lse, ScalarType::Float, rows, "[B, N, Hq]", "q", a.q);
}

Tensor gradient_of(const Tensor& tensor, bool wanted) {
  return empty_on(tensor, {wanted ? tensor.size(0) : 0, tensor.size(1), tensor.size(2), tensor.size(3)},
                  tensor.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> tree_attention_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& out, const Tensor& lse, const Tensor& cache_seqlens,
    const Tensor& ancestors, const Tensor& depth, const Tensor& n_nodes,
    const std::optional<Tensor>& block_table, std::optional<double> scale, std::optional<int64_t> window,
    std::optional<double> softcap, const std::optional<Tensor>& sinks, bool query, bool caches) {
  const TensorChecks check("tree_attention_backward");
  const std::optional<Tensor> none;
  const TreeAttentionArguments a{q,       k_cache,     v_cache, cache_seqlens, ancestors, depth,
                                 n_nodes, block_table, sinks,   none,          none};
  check_tensors(check, a);
  check_gradients(check, a, grad_out, grad_lse, out, lse);

  Tensor grad_q = gradient_of(q, query), grad_k = gradient_of(k_cache, caches),
         grad_v = gradient_of(v_cache, caches);
  TreeAttentionBackwardParams params{};
  params.forward = make_params(a, out, lse);
  set_scalars(check, params.forward, scale, window, softcap, false);
  if (q.numel() == 0 || k_cache.numel() == 0) {
    torch::stable::zero_(grad_q);
    torch::stable::zero_(grad_k);
    torch::stable::zero_(grad_v);
    return {grad_q, grad_k, grad_v};
  }
  if (checks_values()) check_lengths(check, a);

  params.grad_out = grad_out.const_data_ptr();
  params.grad_lse = data<float>(grad_lse);
  params.grad_q = query ? grad_q.mutable_data_ptr() : nullptr;
  params.grad_k = caches ? grad_k.mutable_data_ptr() : nullptr;
  params.grad_v = caches ? grad_v.mutable_data_ptr() : nullptr;
  const Tensor workspace =
      empty_on(q, {int64_t(KERNEL(tree_attention_backward_workspace)(params))}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  RUN_KERNEL(tree_attention_backward, params, q, k_cache, v_cache, out, lse, grad_out, grad_lse,
             cache_seqlens, ancestors, depth, n_nodes, block_table, sinks, grad_q, grad_k, grad_v, workspace);
  return {grad_q, grad_k, grad_v};
}

REGISTER_OP(
    tree_attention_backward,
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k_cache, Tensor v_cache, Tensor out, Tensor lse, "
    "Tensor cache_seqlens, Tensor ancestors, Tensor depth, Tensor n_nodes, Tensor? block_table=None, "
    "float? scale=None, SymInt? window=None, float? softcap=None, Tensor? sinks=None, bool query=True, "
    "bool caches=True) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)")

}  // namespace
}  // namespace tranche
