"""`HeadCache`: a draft head's own keys and values, and its passes over committed text and over beams."""

from __future__ import annotations

import torch
from torch import Tensor

from tranche.decode.head import JakiroHead
from tranche.tree import Tree, tree_attention, write_cache_

_PASS = 512  # pairs that are taken in at once


class HeadCache:
    """What a head has seen of each sequence of a batch.

    Position t of a sequence is the pair of the target's feature at t and the token at t + 1. Pairs wait until a tree
    is wanted: a step that another drafter serves costs no pass of the head.
    """

    def __init__(self, head: JakiroHead, batch: int, capacity: int):
        """Room for `capacity` pairs, those of a beam search included, in each of `batch` sequences."""
        config = head.config
        self._head = head
        device = head.fc.weight.device
        self._on_host = device.type == "cpu"
        shape = (batch, capacity, *head.kv_shape)
        self._k = torch.zeros(shape, dtype=head.dtype, device=device)
        self._v = torch.zeros(shape, dtype=head.dtype, device=device)
        self._seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self._state = torch.zeros(batch, config.hidden_size, dtype=head.dtype, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._parents: list[Tensor] = []  # of the beam search under way, by level

    def append(self, features: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """The first counts[b] of the pairs of features [B, N, H] and tokens int64 [B, N] are committed."""
        if self._on_host:  # rows that no sequence committed need not be kept
            width = int(counts.max()) if counts.numel() else 0
            features, tokens = features[:, :width], tokens[:, :width]
        if tokens.size(1) == 0:
            return
        self._waiting.append((features, tokens, counts.to(torch.int32)))
        if sum(waiting[1].size(1) for waiting in self._waiting) >= _PASS:
            self._take_in()

    def advance(self, *, contrast: bool) -> tuple[Tensor, Tensor | None]:
        """Take in the pairs that wait; the head's outputs [B, H] after each sequence's last pair."""
        self._take_in()
        self._parents = []
        return self._head.outputs(self._state, contrast)

    def _take_in(self) -> None:
        """One pass over all pairs that wait, each sequence's own number of them."""
        if not self._waiting:
            return
        total = sum(waiting[1].size(1) for waiting in self._waiting)
        batch = self._seqlens.size(0)
        first = self._waiting[0][0]
        features = first.new_zeros(batch, total + 1, first.size(2))
        tokens = torch.zeros(batch, total + 1, dtype=torch.int64, device=first.device)
        counts = torch.zeros_like(self._seqlens)
        for some, following, added in self._waiting:
            column = torch.arange(following.size(1), device=first.device)
            # what a sequence did not commit goes to one column past the end
            place = torch.where(column < added[:, None], counts[:, None] + column, total)
            tokens.scatter_(1, place, following)
            features.scatter_(1, place[:, :, None].expand_as(some), some)
            counts = counts + added
        self._waiting.clear()
        if self._on_host:
            total = int(counts.max())
        z = self._head.fuse(tokens[:, :total], features[:, :total])
        column = torch.arange(total, dtype=torch.int32, device=z.device)
        tree = Tree.from_parent((column - 1).repeat(batch, 1), counts)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            write_cache_(k, v, self._k, self._v, self._seqlens, tree)
            out = tree_attention(q, self._k, self._v, self._seqlens, tree)
            assert isinstance(out, Tensor)
            return out

        h = self._head.attention(z, tree.positions(self._seqlens), attend)
        last = (counts - 1).clamp(min=0).long()[:, None, None].expand(-1, 1, h.size(2))
        self._state = torch.where((counts > 0)[:, None], h.gather(1, last)[:, 0], self._state)
        self._seqlens += counts

    def grow(
        self, tokens: Tensor, features: Tensor, parent_beam: Tensor, *, contrast: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One pass over a beam below the one before, none of it committed.

        Args:
            tokens: int64 [B, k], the beam.
            features: [B, k, H], the head's outputs that each of them was drawn from.
            parent_beam: int32 [B, k], which node of the beam before each continues; of the first beam, not looked at.
            contrast: whether the second output is wanted.

        Returns:
            The outputs [B, k, H].
        """
        batch, k = tokens.shape
        # node 0 is the last committed pair, which stands in its slot already; k nodes a level follow
        known = sum(level.size(1) for level in self._parents)
        base = 1 + known - (self._parents[-1].size(1) if self._parents else 0)
        self._parents.append(torch.zeros_like(parent_beam) if known == 0 else parent_beam + base)
        root = torch.full_like(parent_beam[:, :1], -1)
        tree = Tree.from_parent(torch.cat([root, *self._parents], 1))
        start = self._seqlens - 1
        positions = tree.positions(start)[:, -k:]
        level = Tree.from_parent(
            torch.arange(-1, k - 1, dtype=torch.int32, device=tokens.device).repeat(batch, 1)
        )

        def attend(q: Tensor, k_new: Tensor, v_new: Tensor) -> Tensor:
            write_cache_(k_new, v_new, self._k, self._v, self._seqlens + known, level)
            # only the new level's rows are wanted; the others are there for the numbering of the slots
            rows = torch.cat([q.new_zeros(batch, 1 + known, *q.shape[2:]), q], 1)
            out = tree_attention(rows, self._k, self._v, start, tree)
            assert isinstance(out, Tensor)
            return out[:, -k:]

        return self._head.outputs(
            self._head.attention(self._head.fuse(tokens, features), positions, attend), contrast
        )
