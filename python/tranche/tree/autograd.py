"""Derivatives of the family's ops. A call that needs none never comes here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tranche import _library


def wanted(*tensors: Tensor | None) -> bool:
    """Whether a call with these arguments must be recorded."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Attention(torch.autograd.Function):
    """tree_attention, recorded; see `csrc/tree/tree_attention_backward.h` for the equations."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        sinks: Tensor | None,
        cache_seqlens: Tensor,
        ancestors: Tensor,
        depth: Tensor,
        n_nodes: Tensor,
        block_table: Tensor | None,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        exact: bool,
    ) -> tuple[Tensor, Tensor]:
        structure = (cache_seqlens, ancestors, depth, n_nodes, block_table)
        out, lse = _library.ops().tree_attention(
            q, k_cache, v_cache, *structure, scale, window, softcap, sinks, None, None, True, exact
        )
        ctx.save_for_backward(q, k_cache, v_cache, sinks, out, lse, *structure)
        ctx.numbers = (scale, window, softcap)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        # a compiled graph is differentiated once anyway, and is traced with grad enabled
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "tranche.tree_attention: expected to be differentiated once, got create_graph=True. "
                "Its backward pass has no derivative: leave create_graph out."
            )
        q, k_cache, v_cache, sinks, out, lse, *structure = ctx.saved_tensors
        grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
        query, caches = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad_q = grad_k = grad_v = grad_sinks = None
        if query or caches:
            grad_q, grad_k, grad_v = _library.ops().tree_attention_backward(
                grad_out,
                grad_lse,
                q,
                k_cache,
                v_cache,
                out,
                lse,
                *structure,
                *ctx.numbers,
                sinks,
                query,
                caches,
            )
        if sinks is not None and ctx.needs_input_grad[3]:
            grad_sinks = _gradient_of_sinks(grad_out, out, lse, sinks)
        return (
            grad_q if query else None,
            grad_k if ctx.needs_input_grad[1] else None,
            grad_v if ctx.needs_input_grad[2] else None,
            grad_sinks,
            *(None,) * 9,
        )


def _gradient_of_sinks(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """-(sum over rows of the sink's weight times <grad_out, out>); rows that see nothing have a constant out."""
    delta = (grad_out.to(torch.promote_types(out.dtype, torch.float32)) * out).sum(-1)
    share = torch.where(torch.isneginf(lse), 0, torch.sigmoid(sinks - lse) * delta)
    return -share.sum((0, 1)).to(sinks.dtype)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sinks: Tensor | None,
    structure: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    scale: float | None,
    window: int | None,
    softcap: float | None,
    exact: bool,
    scales: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """tree_attention's out and lse, both differentiable.

    Raises:
        ValueError: caches of another dtype than q's.
    """
    if k_cache.dtype != q.dtype or scales != (None, None):
        raise ValueError(
            f"tranche.tree_attention: expected caches of dtype {q.dtype} where gradients are wanted, got "
            f"{k_cache.dtype}. Convert them with k_cache.to(q.dtype) * k_scale[:, None], or call under torch.no_grad()."
        )
    return _Attention.apply(q, k_cache, v_cache, sinks, *structure, scale, window, softcap, exact)


class _MergeState(torch.autograd.Function):
    """merge_state, recorded. With w = exp(lse_side - lse) and d = <grad_out, out_side - out> of a side:

    grad_out_side = w grad_out, and grad_lse_side = w (d + grad_lse).
    """

    @staticmethod
    def forward(
        ctx: Any, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = _library.ops().tree_merge_state(out_a, lse_a, out_b, lse_b)
        ctx.save_for_backward(out_a, lse_a, out_b, lse_b, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
        out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
        wide = grad_out.to(torch.promote_types(out.dtype, torch.float32))
        gradients = []
        for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
            unseen = torch.isneginf(part_lse)
            weight = torch.where(unseen, 0, torch.exp(part_lse - lse))
            # values of a side that saw nothing have no say, not even as 0 * NaN
            difference = torch.where(unseen[..., None], 0, part - out)
            gradients.append((weight[..., None] * wide).to(part.dtype))
            gradients.append((weight * ((wide * difference).sum(-1) + grad_lse)).to(part_lse.dtype))
        return tuple(gradients)


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable form of `tranche.tree.merge_state`."""
    return _MergeState.apply(out_a, lse_a, out_b, lse_b)
