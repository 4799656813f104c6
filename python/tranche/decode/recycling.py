"""`RecyclingDrafter`: the target's own candidates of earlier passes, kept by token (Token Recycling)."""

from __future__ import annotations

import heapq
import itertools

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tranche.decode import target
from tranche.decode.drafter import Context
from tranche.tree import Accepted, Tree

_TEMPLATE_NODES = 80
_FIRST = 0.5  # chance of a node's likeliest candidate in the template
_REST = 0.6  # of each next one, as a share of the one before


def template(nodes: int, width: int) -> tuple[list[int], list[int], list[int]]:
    """The static tree: the likeliest nodes, if a token's candidates are right with chances that fall with their rank.

    Returns:
        parent, rank among the parent's candidates, and depth of each node, the likeliest nodes first; -1, 0, 0 at
        the root.
    """
    chances = [_FIRST * (1 - _FIRST) * _REST**rank if rank else _FIRST for rank in range(width)]
    order = itertools.count()
    heap = [(-1.0, next(order), -1, 0, 0)]
    parents: list[int] = []
    ranks: list[int] = []
    depths: list[int] = []
    while heap and len(parents) < nodes:
        chance, _, parent, rank, depth = heapq.heappop(heap)
        node = len(parents)
        parents.append(parent)
        ranks.append(rank)
        depths.append(depth)
        for k, of_rank in enumerate(chances):
            heapq.heappush(heap, (chance * of_rank, next(order), node, k, depth + 1))
    return parents, ranks, depths


class RecyclingDrafter:
    """Keeps, for each token of the vocabulary, the `width` likeliest tokens after it when the target last saw it.

    "Turning Trash into Treasure" (arXiv 2408.08696): an adjacency matrix on the device and a static tree of 80 nodes,
    whose smaller versions are its first nodes. All sequences of a batch, and later calls with the same drafter, share
    the matrix. Where a pass saw a token in several nodes, the last in order of sequence, then node, is kept.
    """

    def __init__(self, width: int = 8):
        """`width` is the candidates kept for each token.

        Raises:
            ValueError: width < 1.
        """
        if width < 1:
            raise ValueError(f"tranche.RecyclingDrafter: expected width >= 1, got {width}. Keep a candidate.")
        self.width = width
        self._adjacency: Tensor | None = None  # int64 [V, width]
        parents, ranks, depths = template(_TEMPLATE_NODES, width)
        self._parents, self._ranks, self._depths = parents, ranks, depths
        # by number of nodes: the parents int32 [1, N], and of each depth the nodes, their parents and their ranks
        self._templates: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]] = {}

    def prepare(self, model: PreTrainedModel, batch: int, capacity: int, device: torch.device) -> None:
        """The matrix, unless an earlier call with the same vocabulary left one."""
        vocabulary = target.vocabulary(model)
        known = self._adjacency
        if known is None or known.size(0) != vocabulary or known.device != device:
            self._adjacency = torch.zeros(vocabulary, self.width, dtype=torch.int64, device=device)
            self._templates.clear()
        self._kept = torch.empty(vocabulary, dtype=torch.int64, device=device)

    def _template(
        self, nodes: int, device: torch.device
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """The first nodes of the static tree, on the device."""
        if nodes not in self._templates:
            levels = []
            for depth in range(1, max(self._depths[:nodes]) + 1):
                level = [node for node in range(nodes) if self._depths[node] == depth]
                parents = [self._parents[node] for node in level]
                ranks = [self._ranks[node] for node in level]
                nodes_of, parents_of, ranks_of = (
                    torch.tensor(p, device=device) for p in (level, parents, ranks)
                )
                levels.append((nodes_of, parents_of, ranks_of))
            parent = torch.tensor([self._parents[:nodes]], dtype=torch.int32, device=device)
            self._templates[nodes] = parent, levels
        return self._templates[nodes]

    def propose(self, context: Context) -> tuple[Tree, Tensor]:
        """The template, filled from the matrix level by level."""
        assert self._adjacency is not None
        root = context.root
        nodes = min(context.tree_size, len(self._parents))
        parent, levels = self._template(nodes, root.device)
        tokens = root[:, None].repeat(1, nodes)
        for level, parents, ranks in levels:
            tokens[:, level] = self._adjacency[tokens[:, parents], ranks]
        return Tree.from_parent(parent.repeat(root.size(0), 1)), tokens

    def observe(self, context: Context, accepted: Accepted) -> None:
        """Keep the likeliest tokens after every node that the target scored."""
        if context.logits is None:
            return
        assert self._adjacency is not None
        batch, nodes = context.node_tokens.shape
        token = context.node_tokens.flatten()
        column = torch.arange(nodes, device=token.device)
        real = (column < context.tree.n_nodes[:, None]).flatten()
        order = torch.where(real, torch.arange(batch * nodes, device=token.device), -1)
        self._kept.fill_(-1)
        self._kept.scatter_reduce_(0, token, order, "amax")
        wins = (real & (self._kept[token] == order))[:, None]
        best = context.logits.flatten(0, 1).topk(min(self.width, context.logits.size(2)), dim=1).indices
        # losers add 0: sums of integers, so that the order of writes to one row does not matter
        change = torch.where(wins, best - self._adjacency[token, : best.size(1)], 0)
        self._adjacency[:, : best.size(1)].index_add_(0, token, change)
