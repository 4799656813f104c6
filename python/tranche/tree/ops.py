"""Typed functions of the family; each calls the raw op of flat tensors behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tranche import _library

if TYPE_CHECKING:
    from tranche.tree.structure import Tree


def tree_ancestors(parent: Tensor, n_nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Ancestors and depth of every node.

    Args:
        parent: int32 [B, N], -1 at node 0 and parent[b, i] < i elsewhere; N <= 1024.
        n_nodes: int32 [B], nodes in use.

    Returns:
        ancestors: int64 [B, N, ceil(N / 64)], bit j % 64 of word j // 64 of row i: node j is i or an ancestor of i.
        depth: int32 [B, N], 0 at the root. Rows past n_nodes are zero in both.

    Raises:
        ValueError: a wrong shape, dtype or device.
        IndexError: a bad parent or count (CPU; on CUDA counts are clamped and such a node hangs under the root).
    """
    return _library.ops().tree_ancestors(parent, n_nodes)


@_library.register_fake("tree_ancestors")
def _(parent: Tensor, n_nodes: Tensor) -> tuple[Tensor, Tensor]:
    batch, nodes = parent.shape
    ancestors = parent.new_empty((batch, nodes, (nodes + 63) // 64), dtype=torch.int64)
    return ancestors, torch.empty_like(parent, memory_format=torch.contiguous_format)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every node of a draft tree over the committed tokens and its own ancestors.

    The keys and values of node i are already in slot cache_seqlens[b] + i of the caches. Row i sees the slots below
    cache_seqlens[b], its ancestors, and itself. N = 1 is ordinary decoding, `Tree.chain` ordinary causal attention.

    Args:
        q: [B, N, Hq, D]; float32, float16 or bfloat16 (float64 on the CPU). D in {32, 64, 80, 96, 128, 160, 192,
            256}, N <= 1024.
        k_cache: [B, S, Hkv, D], or [pages, page_size, Hkv, D] with `block_table`; the dtype of q, or
            float8_e4m3fn. Hq is a multiple of Hkv. Any strides but a contiguous last dimension.
        v_cache: the same shape and dtype.
        cache_seqlens: int32 [B], committed tokens.
        tree: the trees, of N nodes each at most.
        block_table: int32 [B, max_pages], the pages of each sequence in order.
        scale: what scores are multiplied with; D ** -0.5 when left out.
        window: a key is visible only if its position > the row's position - window. Positions count depth:
            cache_seqlens + depth for a node.
        softcap: scores become softcap * tanh(scores / softcap), before the mask.
        sinks: float32 [Hq]; exp(sink) is added to the softmax's denominator, and left out of lse.
        k_scale: float32 [Hkv], what stored float8 keys are multiplied with.
        v_scale: likewise for values.
        return_lse: also return the logarithm of the sum of exponentials.
        exact: lay the arithmetic out by key position, so that a row's bits equal those of decoding its path token
            by token (N = 1) from a cache to which its ancestors were committed.

    Returns:
        out: [B, N, Hq, D], contiguous. Rows past n_nodes are zero.
        lse: float32 [B, N, Hq], natural logarithm; -inf for rows past n_nodes. Only with return_lse.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or number.
        IndexError: lengths or pages that leave the cache (CPU, and elsewhere under TRANCHE_CHECK=1; otherwise
            they are clamped into the cache).
    """
    out, lse = _library.ops().tree_attention(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        tree.ancestors,
        tree.depth,
        tree.n_nodes,
        block_table,
        scale,
        window,
        softcap,
        sinks,
        k_scale,
        v_scale,
        return_lse,
        exact,
    )
    return (out, lse) if return_lse else out


@_library.register_fake("tree_attention")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    ancestors: Tensor,
    depth: Tensor,
    n_nodes: Tensor,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, nodes, heads, head_dim = q.shape
    lse = q.new_empty((batch if return_lse else 0, nodes, heads), dtype=torch.float32)
    return q.new_empty((batch, nodes, heads, head_dim)), lse
