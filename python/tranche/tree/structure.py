"""`Tree`: the shape of a batch of draft trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tranche.tree.ops import tree_ancestors

WORD_BITS = 64


@dataclass(frozen=True)
class Tree:
    """The shape of B draft trees of at most N nodes, made once per step and used by all layers.

    Nodes are numbered so that a parent comes before its children; the root is node 0. Rows past `n_nodes` are
    padding: no ancestors, depth 0.

    Attributes:
        parent: int32 [B, N]; -1 at the root, else parent[b, i] < i.
        n_nodes: int32 [B]; nodes in use.
        depth: int32 [B, N]; 0 at the root.
        ancestors: int64 [B, N, W], W = ceil(N / 64); bit j % 64 of word j // 64 of row i is set when node j is an
            ancestor of node i, or i itself.
    """

    parent: Tensor
    n_nodes: Tensor
    depth: Tensor
    ancestors: Tensor

    @classmethod
    def from_parent(cls, parent: Tensor, n_nodes: Tensor | None = None) -> Tree:
        """The trees whose nodes have these parents.

        Args:
            parent: int32 [B, N], N <= 1024.
            n_nodes: int32 [B]; all N nodes when left out.

        Raises:
            ValueError: a wrong shape, dtype or device.
            IndexError: on the CPU, a parent that is not smaller than its child or a root that is not -1. On CUDA
                such a node becomes a child of the root.
        """
        if n_nodes is None:
            n_nodes = torch.full((parent.size(0),), parent.size(1), dtype=torch.int32, device=parent.device)
        ancestors, depth = tree_ancestors(parent, n_nodes)
        return cls(parent, n_nodes, depth, ancestors)

    @classmethod
    def from_choices(
        cls, choices: Sequence[Sequence[int]], batch: int = 1, device: torch.device | str | None = None
    ) -> Tree:
        """The same static tree for every sequence, from paths of child ranks as Medusa writes them.

        `(0,)` is the root's best child, `(0, 1)` the second best child of that node. The root is implied. Nodes
        are ordered by depth, then by path.

        Raises:
            ValueError: a path is given twice, or its parent is missing.
        """
        paths = sorted((tuple(path) for path in choices), key=lambda path: (len(path), path))
        index = {(): 0} | {path: i for i, path in enumerate(paths, start=1)}
        if len(index) != len(paths) + 1:
            raise ValueError(
                "tranche.Tree.from_choices: expected distinct, non-empty paths. Remove the repeated ones."
            )
        for path in paths:
            if path[:-1] not in index:
                raise ValueError(
                    f"tranche.Tree.from_choices: expected the parent {path[:-1]} of {path} among the choices. Add it."
                )
        parents = [-1, *(index[path[:-1]] for path in paths)]
        row = torch.tensor([parents], dtype=torch.int32, device=device)
        return cls.from_parent(row.repeat(batch, 1))

    @classmethod
    def chain(cls, n: int, batch: int = 1, device: torch.device | str | None = None) -> Tree:
        """Trees of n nodes without branches: ordinary causal attention among them."""
        row = torch.arange(-1, n - 1, dtype=torch.int32, device=device)
        return cls.from_parent(row.repeat(batch, 1))

    def to(self, device: torch.device | str) -> Tree:
        """The same trees on another device."""
        return Tree(
            self.parent.to(device), self.n_nodes.to(device), self.depth.to(device), self.ancestors.to(device)
        )

    def positions(self, cache_seqlens: Tensor) -> Tensor:
        """Absolute position of each node, int64 [B, N]: cache_seqlens [B] plus its depth."""
        return cache_seqlens.to(torch.int64)[:, None] + self.depth

    def dense_mask(self) -> Tensor:
        """Which node sees which, bool [B, N, N]: entry [b, i, j] says that j is i or an ancestor of i."""
        node = torch.arange(self.parent.size(1), device=self.parent.device)
        words = self.ancestors[:, :, node // WORD_BITS]
        return (words >> (node % WORD_BITS)).bitwise_and(1).to(torch.bool)

    def paths(self) -> Tensor:
        """Each leaf's nodes from the root, int32 [B, L, P], padded with -1.

        Leaves come in ascending order; L is the largest number of leaves of a tree and P the longest path. Both
        depend on the data, so this reads them back from the device.
        """
        batch, nodes = self.parent.shape
        node = torch.arange(nodes, device=self.parent.device)
        sees = self.dense_mask()
        used = node < self.n_nodes[:, None]
        is_leaf = used & (sees.sum(1) == 1)
        count = is_leaf.sum(1)
        leaves = int(count.max()) if batch else 0
        length = int(self.depth.max()) + 1 if leaves else 0
        # A stable sort moves the leaves to the front in ascending order.
        leaf = torch.sort(is_leaf.to(torch.int8), dim=1, descending=True, stable=True).indices[:, :leaves]
        is_real = torch.arange(leaves, device=leaf.device) < count[:, None]
        on_path = sees.gather(1, leaf[:, :, None].expand(batch, leaves, nodes)) & is_real[:, :, None]
        # Nodes off the path are sent to one column past the end, which is cut off again.
        column = torch.where(on_path, self.depth[:, None, :].to(torch.int64), length)
        padded = torch.full((batch, leaves, length + 1), -1, dtype=torch.int32, device=leaf.device)
        padded.scatter_(2, column, node.to(torch.int32).expand(batch, leaves, nodes))
        return padded[:, :, :length].contiguous()


torch.export.register_dataclass(Tree, serialized_type_name="tranche.tree.Tree")
