"""What the family's ops mean, in plain torch and any floating dtype. Slow and clear; the tests' oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from tranche.tree.reference_growth import compact_cache_, expand_beam, select_tree, write_cache_
from tranche.tree.reference_structure import tree_ancestors
from tranche.tree.reference_verify import (
    draw,
    is_near_a_step,
    philox,
    probabilities,
    sample,
    uniform,
    verify_greedy,
    verify_sample,
    verify_typical,
    walk_law,
)
from tranche.tree.structure import Tree

__all__ = [
    "compact_cache_",
    "draw",
    "expand_beam",
    "gather_slots",
    "is_near_a_step",
    "philox",
    "probabilities",
    "sample",
    "select_tree",
    "tree_ancestors",
    "tree_attention",
    "uniform",
    "verify_greedy",
    "verify_sample",
    "verify_typical",
    "visible_slots",
    "walk_law",
    "write_cache_",
]


def gather_slots(cache: Tensor, sequence: int, slots: int, block_table: Tensor | None) -> Tensor:
    """The first `slots` slots of one sequence, [slots, Hkv, D], from a contiguous or a paged cache."""
    if block_table is None:
        return cache[sequence, :slots]
    page_size = cache.size(1)
    slot = torch.arange(slots, device=cache.device)
    return cache[block_table[sequence, slot // page_size].long(), slot % page_size]


def visible_slots(cache_seqlen: int, n_nodes: int, tree: Tree, sequence: int, window: int | None) -> Tensor:
    """Which of the slots [0, cache_seqlen + n_nodes) each node sees, bool [n_nodes, slots]."""
    depth = tree.depth[sequence, :n_nodes]
    prefix = torch.ones(n_nodes, cache_seqlen, dtype=torch.bool, device=depth.device)
    visible = torch.cat([prefix, tree.dense_mask()[sequence, :n_nodes, :n_nodes]], dim=1)
    if window is not None:
        position = torch.cat([torch.arange(cache_seqlen, device=depth.device), cache_seqlen + depth])
        visible &= position[None, :] > (cache_seqlen + depth)[:, None] - window
    return visible


def dot_products(q: Tensor, k: Tensor) -> Tensor:
    """q @ k.T, whose gradients leave out keys that are not finite: else they would reach rows that do not see them."""
    is_finite = torch.isfinite(k).all(dim=1)
    finite = q @ torch.where(is_finite[:, None], k, 0).T
    return torch.where(is_finite, finite, (q @ k.T).detach())


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    tree: Tree,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    exact: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `tranche.tree.tree_attention`; `exact` changes nothing here.

    Args:
        compute_dtype: what everything is computed in, and the dtype of both results. Pass q.dtype for "the same
            computation in plain torch", whose error is the yardstick for the kernels'.
    """
    batch, nodes, heads_q, head_dim = q.shape
    heads_kv = k_cache.size(2)
    group = heads_q // heads_kv
    factor = head_dim**-0.5 if scale is None else scale
    out = q.new_zeros(q.shape, dtype=compute_dtype)
    lse = q.new_full((batch, nodes, heads_q), -torch.inf, dtype=compute_dtype)
    for b in range(batch):
        n = int(tree.n_nodes[b])
        if n == 0:
            continue
        length = int(cache_seqlens[b])
        visible = visible_slots(length, n, tree, b, window)
        k = gather_slots(k_cache, b, length + n, block_table).to(compute_dtype)
        v = gather_slots(v_cache, b, length + n, block_table).to(compute_dtype)
        if k_scale is not None:
            k = k * k_scale.to(compute_dtype)[:, None]
        if v_scale is not None:
            v = v * v_scale.to(compute_dtype)[:, None]
        for h in range(heads_q):
            scores = dot_products(q[b, :n, h].to(compute_dtype), k[:, h // group]) * factor
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            # select, never add: a non-finite score of an invisible slot must vanish
            scores = torch.where(visible, scores, -torch.inf)
            row_lse = torch.logsumexp(scores, dim=1)
            # a row that sees nothing has no weights, rather than 0 / 0
            weights = torch.where(visible, torch.exp(scores - row_lse[:, None]), 0)
            if sinks is not None:
                weights = weights * torch.sigmoid(row_lse - sinks[h].to(compute_dtype))[:, None]
            # 0 * NaN is NaN: the values of invisible slots are dropped before the product
            values = v[:, h // group]
            finite = torch.where(torch.isfinite(values), values, 0)
            result = weights @ finite
            seen = visible.to(compute_dtype)
            for special in (torch.inf, -torch.inf, torch.nan):
                mask = torch.isnan(values) if special != special else values == special
                result = torch.where(seen @ mask.to(compute_dtype) > 0, result + special, result)
            out[b, :n, h] = result
            lse[b, :n, h] = row_lse
    return (out, lse) if return_lse else out


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, compute_dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """See `tranche.tree.merge_state`; both results are of `compute_dtype`."""
    a, b = lse_a.to(compute_dtype), lse_b.to(compute_dtype)
    lse = torch.logaddexp(a, b)
    result = torch.zeros_like(out_a, dtype=compute_dtype)
    for out, part in ((out_a, a), (out_b, b)):
        weight = torch.exp(part - lse)[..., None]
        # a side that saw nothing is dropped, whatever its values; so are both weights of 0 / 0
        result = result + torch.where(torch.isneginf(part)[..., None], 0, weight * out.to(compute_dtype))
    return result, lse
