"""KV caches of draft trees: writing the nodes' rows, and keeping those of the accepted path."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tranche import _library
from tranche.tree.accepted import Accepted
from tranche.tree.structure import Tree


def write_cache_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    tree: Tree,
    *,
    block_table: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Put the nodes' keys and values into their slots: node i < n_nodes into slot cache_seqlens + i.

    With `rope`, keys are first rotated at position cache_seqlens + depth (siblings share one), by the convention of
    transformers' rotate_half, which pairs element e with e + D / 2; queries are the model's to rotate. Products and
    sums are rounded to float32 one by one, and the result once to the cache's dtype. One launch on CUDA.

    Args:
        k: [B, N, Hkv, D]; float32, float16 or bfloat16 (float64 on the CPU). Any strides but a contiguous last
            dimension, here and for v and the caches.
        v: likewise.
        k_cache: [B, S, Hkv, D], or [pages, page_size, Hkv, D] with `block_table`; the dtype of k, or float8_e4m3fn,
            which stores k / k_scale, saturated at 448.
        v_cache: likewise.
        cache_seqlens: int32 [B], committed tokens.
        tree: the trees, of N nodes each at most.
        block_table: int32 [B, max_pages], the pages of each sequence in order.
        rope: (cos, sin), each [positions, D], or [positions, D / 2] when both halves share their angles; float32 or
            the dtype of k, contiguous.
        k_scale: float32 [Hkv], for float8 caches; 1 when left out.
        v_scale: likewise.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
        RuntimeError: a tensor requires grad; autograd cannot see through a write.
        IndexError: slots or pages that are not in the cache, positions past the table (CPU, and elsewhere under
            TRANCHE_CHECK=1; otherwise lengths and pages are clamped into the cache, positions to the last).
    """
    cos, sin = rope if rope is not None else (None, None)
    _library.call_inplace(
        "tree_write_cache_",
        k,
        v,
        k_cache,
        v_cache,
        cache_seqlens,
        tree.depth,
        tree.n_nodes,
        block_table,
        cos,
        sin,
        k_scale,
        v_scale,
    )


@_library.register_fake("tree_write_cache_")
def _(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    depth: Tensor,
    n_nodes: Tensor,
    block_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    return None


def compact_cache_(
    caches: Sequence[Tensor], accepted: Accepted, cache_seqlens: Tensor, *, block_table: Tensor | None = None
) -> None:
    """Keep the accepted path in every cache, in place, and advance the lengths.

    Moves slot cache_seqlens + path[j] to slot cache_seqlens + j for j <= length, in all caches, then adds length + 1 to
    cache_seqlens. Sequences may accept different lengths. Slots below cache_seqlens are neither read nor written, so
    pages of a shared prefix stay as they are. A sequence whose path is all -1 (its tree had no nodes) is left alone.
    One launch on CUDA for up to 256 caches.

    Args:
        caches: all layers' keys and values, each [B, S, Hkv, D] or [pages, page_size, Hkv, D]; float32, float16,
            bfloat16, float64 or float8_e4m3fn. Any strides but a contiguous last dimension; heads, sizes, dtypes and
            strides may differ, up to 8 kinds among 256 caches. No two may share memory.
        accepted: the paths; path is int32 [B, N] and length int32 [B].
        cache_seqlens: int32 [B], committed tokens; in and out.
        block_table: int32 [B, max_pages], the pages of each sequence in order.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
        RuntimeError: a cache requires grad; autograd cannot see through the move.
        IndexError: a path that does not ascend from the root or leaves the cache, a length past it (CPU, and
            elsewhere under TRANCHE_CHECK=1; otherwise such an entry moves nothing, and lengths are clamped).
    """
    _library.call_inplace(
        "tree_compact_cache_", list(caches), accepted.path, accepted.length, cache_seqlens, block_table
    )


@_library.register_fake("tree_compact_cache_")
def _(
    caches: list[Tensor],
    path: Tensor,
    length: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
) -> None:
    return None


_library.register_inplace("tree_write_cache_")
_library.register_inplace("tree_compact_cache_")
