"""Typed functions of the family; each calls the raw op of flat tensors behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tranche import _library
from tranche.tree import autograd

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
    out: Tensor | None = None,
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
        out: where the result is written, [B, N, Hq, D] of q's dtype. Any strides but a contiguous last dimension;
            rows must not overlap, nor share memory with the inputs. The bits are those of a call without it.

    Returns:
        out: [B, N, Hq, D], contiguous, or the `out` that was given. Rows past n_nodes are zero.
        lse: float32 [B, N, Hq], natural logarithm; -inf for rows past n_nodes. Only with return_lse.

    Raises:
        TypeError: a tree that is none.
        ValueError: a wrong shape, dtype, device, stride or number.
        IndexError: lengths or pages that leave the cache (CPU, and elsewhere under TRANCHE_CHECK=1; otherwise
            they are clamped into the cache).
        RuntimeError: `out` together with an argument that requires a gradient.

    Gradients flow from both results to q, both caches and sinks (see `docs/tree-gradients.md`), for caches of q's
    dtype. A cache's gradient is dense: it has the cache's shape, and zeros in the slots that no row sees.
    """
    try:
        structure = (cache_seqlens, tree.ancestors, tree.depth, tree.n_nodes, block_table)
    except AttributeError:
        raise TypeError(
            f"tranche.tree_attention: expected tree a tranche.tree.Tree, got {type(tree).__name__}. "
            "Use Tree.chain(n, batch) for ordinary causal attention."
        ) from None
    if out is None and autograd.wanted(q, k_cache, v_cache, sinks):
        result, lse = autograd.attention(
            q, k_cache, v_cache, sinks, structure, scale, window, softcap, exact, (k_scale, v_scale)
        )
        return (result, lse) if return_lse else result
    arguments = (
        q,
        k_cache,
        v_cache,
        *structure,
        scale,
        window,
        softcap,
        sinks,
        k_scale,
        v_scale,
        return_lse,
        exact,
    )
    if out is not None:
        lse = _library.call_inplace("tree_attention_out", *arguments, out=out)
        return (out, lse) if return_lse else out
    result, lse = _library.ops().tree_attention(*arguments)
    return (result, lse) if return_lse else result


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


@_library.register_fake("tree_attention_out")
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
    *,
    out: Tensor,
) -> Tensor:
    batch, nodes, heads, _ = q.shape
    return q.new_empty((batch if return_lse else 0, nodes, heads), dtype=torch.float32)


_library.register_inplace("tree_attention_out")


@_library.register_fake("tree_attention_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    lse: Tensor,
    cache_seqlens: Tensor,
    ancestors: Tensor,
    depth: Tensor,
    n_nodes: Tensor,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query: bool = True,
    caches: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    def gradient_of(tensor: Tensor, wanted: bool) -> Tensor:
        return tensor.new_empty((tensor.size(0) if wanted else 0, *tensor.shape[1:]))

    return gradient_of(q, query), gradient_of(k_cache, caches), gradient_of(v_cache, caches)


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint parts of a cache, from the results of each (as in FlashAttention's split caches).

    With e = exp(lse - max(lse_a, lse_b)) of each side: out = (e_a out_a + e_b out_b) / (e_a + e_b), and lse the
    logarithm of the sum of both exponentials. Exchanging the sides changes no bit. Merge more parts two by two; the
    result's bits depend on the order of these merges. Sinks belong into the last one only: they are left out of lse.

    Args:
        out_a: [B, N, Hq, D] of any D; float32, float16 or bfloat16 (float64 on the CPU). Any strides but a contiguous
            last dimension.
        lse_a: float32 [B, N, Hq], natural logarithm; -inf where nothing was seen.
        out_b: the same shape and dtype as out_a.
        lse_b: the same shape as lse_a.

    Returns:
        out: [B, N, Hq, D], contiguous. Where one lse is -inf, the other side bit for bit; where both are, zeros. Where
            one is +inf or NaN (and neither is -inf), NaN.
        lse: float32 [B, N, Hq], the logarithm of exp(lse_a) + exp(lse_b).

    Raises:
        ValueError: a wrong shape, dtype, device or stride.

    Gradients flow to all four arguments.
    """
    if autograd.wanted(out_a, lse_a, out_b, lse_b):
        return autograd.merge_state(out_a, lse_a, out_b, lse_b)
    return _library.ops().tree_merge_state(out_a, lse_a, out_b, lse_b)


@_library.register_fake("tree_merge_state")
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(out_a, memory_format=torch.contiguous_format),
        torch.empty_like(lse_a, memory_format=torch.contiguous_format),
    )
