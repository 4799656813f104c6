"""Draft trees from chains of tokens that may begin alike."""

from __future__ import annotations

import torch
from torch import Tensor

from tranche.tree import Tree


def tree_of_chains(chains: Tensor, lengths: Tensor, nodes: int) -> tuple[Tree, Tensor]:
    """One tree per sequence whose paths are its chains, each shared beginning once.

    Nodes are numbered chain by chain, so that what does not fit is the end of the last chains.

    Args:
        chains: int64 [B, C, L], tokens after the root, the best chain first.
        lengths: int [B, C], how many of each are real.
        nodes: N, the most nodes of a tree, root included.

    Returns:
        tree: B trees of at most N nodes.
        tokens: int64 [B, N]; 0 at the root.
    """
    batch, count, length = chains.shape
    device = chains.device
    real = torch.arange(length, device=device) < lengths[:, :, None]
    # agree[b, c, d, j]: chains c and d are both real and equal up to token j
    agree = (chains[:, :, None] == chains[:, None]) & real[:, :, None] & real[:, None]
    agree = agree.to(torch.uint8).cumprod(3)
    owner = agree.argmax(2)  # the first chain that agrees; the chain itself where it is real
    is_new = real & (owner == torch.arange(count, device=device)[:, None])

    flat = is_new.flatten(1)
    number = flat.cumsum(1).view(batch, count, length)  # of new nodes, from 1
    number = number.gather(1, owner)  # of all: [B, C, L] indexed by the owner, token by token
    parent = torch.cat([torch.zeros_like(number[:, :, :1]), number[:, :, :-1]], 2)

    place = torch.where(is_new & (number < nodes), number, nodes).flatten(1)
    tokens = torch.zeros(batch, nodes + 1, dtype=torch.int64, device=device)
    tokens.scatter_(1, place, chains.flatten(1))
    parents = torch.zeros(batch, nodes + 1, dtype=torch.int64, device=device)
    parents.scatter_(1, place, parent.flatten(1))
    parents[:, 0] = -1
    n_nodes = (1 + flat.sum(1)).clamp(max=nodes).to(torch.int32)
    tree = Tree.from_parent(parents[:, :nodes].to(torch.int32).contiguous(), n_nodes)
    return tree, tokens[:, :nodes].contiguous()
