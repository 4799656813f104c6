"""What a tree's structure means, in plain torch: see `tranche.tree.reference`, which offers this."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_ancestors(parent: Tensor, n_nodes: Tensor) -> tuple[Tensor, Tensor]:
    """See `tranche.tree.tree_ancestors`."""
    batch, nodes = parent.shape
    words = (nodes + 63) // 64
    ancestors = torch.zeros(batch, nodes, words, dtype=torch.int64, device=parent.device)
    depth = torch.zeros_like(parent)
    for b in range(batch):
        for i in range(int(n_nodes[b])):
            if i > 0:
                up = int(parent[b, i])
                ancestors[b, i] = ancestors[b, up]
                depth[b, i] = depth[b, up] + 1
            bit = i % 64
            ancestors[b, i, i // 64] |= (1 << bit) - (1 << 64 if bit == 63 else 0)
    return ancestors, depth
