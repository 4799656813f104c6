"""Modules of the family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tranche.tree.cache import write_cache_
from tranche.tree.ops import tree_attention
from tranche.tree.structure import Tree


@dataclass(frozen=True)
class KVCache:
    """One layer's keys and values, and how many of them are committed.

    Attributes:
        k: [B, S, Hkv, D], or [pages, page_size, Hkv, D] with a block table.
        v: likewise.
        seqlens: int32 [B], committed tokens.
        block_table: int32 [B, max_pages], the pages of each sequence in order.
        k_scale: float32 [Hkv], what stored float8 keys are multiplied with.
        v_scale: likewise for values.
    """

    k: Tensor
    v: Tensor
    seqlens: Tensor
    block_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


torch.export.register_dataclass(KVCache, serialized_type_name="tranche.tree.KVCache")


class TreeAttention(torch.nn.Module):
    """Attention of draft trees between a model's projections: writes the nodes' K and V to the cache, and attends.

    Nothing is committed: node i stays in slot seqlens + i until `compact_cache_` keeps the accepted path. Positional
    encoding is the model's. There is no backward: call it under `torch.no_grad()`.
    """

    sinks: Tensor | None

    def __init__(
        self,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        exact: bool = False,
    ):
        """The keywords are those of `tree_attention`; `sinks` moves with the module and is saved with it."""
        super().__init__()
        self.scale = scale
        self.window = window
        self.softcap = softcap
        self.exact = exact
        self.register_buffer("sinks", sinks)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, tree: Tree) -> Tensor:
        """Attend from every node.

        Args:
            q: [B, N, Hq, D], as `tree_attention` wants it.
            k: [B, N, Hkv, D], as `write_cache_` wants it.
            v: likewise.
            cache: is written to at the tree's slots.
            tree: the trees.

        Returns:
            [B, N, Hq, D]; rows past n_nodes are zero.
        """
        write_cache_(
            k,
            v,
            cache.k,
            cache.v,
            cache.seqlens,
            tree,
            block_table=cache.block_table,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )
        out = tree_attention(
            q,
            cache.k,
            cache.v,
            cache.seqlens,
            tree,
            block_table=cache.block_table,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            exact=self.exact,
        )
        assert isinstance(out, Tensor)
        return out

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"scale={self.scale}, window={self.window}, softcap={self.softcap}, exact={self.exact}"
