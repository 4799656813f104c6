// tranche::tree_attention and tranche::tree_attention_out: schemas, checks, allocation.
#include "tree/tree_attention.h"
#include "core/torch_glue.h"
#include "tree/tree_attention_arguments.h"

namespace tranche {
namespace {

// Attention into `out`, whose rows may have any strides; returns lse.
Tensor attend(const TensorChecks& check, const TreeAttentionArguments& a, std::optional<double> scale,
              std::optional<int64_t> window, std::optional<double> softcap, bool return_lse, bool exact,
              const Tensor& out) {
  Tensor lse = empty_on(a.q, {return_lse ? a.batch() : 0, a.nodes(), a.heads_q()}, ScalarType::Float);
  TreeAttentionParams params = make_params(a, out, lse);
  set_scalars(check, params, scale, window, softcap, exact);
  if (out.numel() == 0) return lse;
  if (checks_values()) check_lengths(check, a);

  const Tensor workspace =
      empty_on(a.q, {int64_t(KERNEL(tree_attention_workspace)(params))}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  RUN_KERNEL(tree_attention, params, a.q, a.k_cache, a.v_cache, a.cache_seqlens, a.ancestors, a.depth,
             a.n_nodes, a.block_table, a.sinks, a.k_scale, a.v_scale, out, lse, workspace);
  return lse;
}

std::tuple<Tensor, Tensor> tree_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                          const Tensor& cache_seqlens, const Tensor& ancestors,
                                          const Tensor& depth, const Tensor& n_nodes,
                                          const std::optional<Tensor>& block_table,
                                          std::optional<double> scale, std::optional<int64_t> window,
                                          std::optional<double> softcap, const std::optional<Tensor>& sinks,
                                          const std::optional<Tensor>& k_scale,
                                          const std::optional<Tensor>& v_scale, bool return_lse, bool exact) {
  const TensorChecks check("tree_attention");
  const TreeAttentionArguments a{q,       k_cache,     v_cache, cache_seqlens, ancestors, depth,
                                 n_nodes, block_table, sinks,   k_scale,       v_scale};
  check_tensors(check, a);
  Tensor out = empty_on(q, {a.batch(), a.nodes(), a.heads_q(), a.head_dim()}, q.scalar_type());
  Tensor lse = attend(check, a, scale, window, softcap, return_lse, exact, out);
  return {out, lse};
}

void check_out(const TensorChecks& check, const TreeAttentionArguments& a, const Tensor& out) {
  check.dim("out", out, 4, "[B, N, Hq, D]");
  check.dtype("out", out, {a.q.scalar_type()});
  check.same_device("out", out, "q", a.q);
  check.same_sizes("out", out, "q", a.q, 4, "Allocate it with torch.empty_like(q).");
  check.that(out.numel() == 0 || out.stride(3) == 1, "out.stride(-1) == 1", out.stride(3),
             "Pass a tensor whose last dimension is contiguous.");
  for (int i = 0; i < 3; ++i) {
    check.that(out.numel() == 0 || out.size(i) == 1 || out.stride(i) != 0, "out whose rows lie apart",
               concat("stride 0 in dimension ", i), "Pass a tensor that was not made by expand().");
  }
}

Tensor tree_attention_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                          const Tensor& cache_seqlens, const Tensor& ancestors, const Tensor& depth,
                          const Tensor& n_nodes, const std::optional<Tensor>& block_table,
                          std::optional<double> scale, std::optional<int64_t> window,
                          std::optional<double> softcap, const std::optional<Tensor>& sinks,
                          const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                          bool return_lse, bool exact, const Tensor& out) {
  const TensorChecks check("tree_attention");
  const TreeAttentionArguments a{q,       k_cache,     v_cache, cache_seqlens, ancestors, depth,
                                 n_nodes, block_table, sinks,   k_scale,       v_scale};
  check_tensors(check, a);
  check_out(check, a, out);
  return attend(check, a, scale, window, softcap, return_lse, exact, out);
}

#define TREE_ATTENTION_ARGUMENTS                                                                      \
  "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor ancestors, Tensor depth, " \
  "Tensor n_nodes, Tensor? block_table=None, float? scale=None, SymInt? window=None, "                \
  "float? softcap=None, Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None, "             \
  "bool return_lse=False, bool exact=False"

REGISTER_OP(tree_attention, TREE_ATTENTION_ARGUMENTS ") -> (Tensor out, Tensor lse)")
REGISTER_OP(tree_attention_out, TREE_ATTENTION_ARGUMENTS ", *, Tensor(a!) out) -> Tensor lse")

}  // namespace
}  // namespace tranche
