"""Random trees with tokens and logits, and the rules by which the walks down them are judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.tree.cases import random_parents
from tranche.tree import Accepted, Tree, reference, verify_sample


@dataclass
class Walk:
    """Trees, their tokens, and the target's logits."""

    tokens: Tensor
    tree: Tree
    logits: Tensor

    def to(self, device: str) -> Walk:
        return Walk(self.tokens.to(device), self.tree.to(device), self.logits.to(device))

    def verify(self, **options: Any) -> Accepted:
        return verify_sample(self.tokens, self.tree, self.logits, **options)

    def reference(self, **options: Any) -> Accepted:
        return reference.verify_sample(self.tokens, self.tree, self.logits, **options)

    def with_logits(self, logits: Tensor) -> Walk:
        return replace(self, logits=logits)


def tree_of(parents: Tensor, counts: tuple[int, ...] | None = None) -> Tree:
    """Made by the reference, so that a case is the same for every backend."""
    n_nodes = torch.tensor(counts or [parents.size(1)] * parents.size(0), dtype=torch.int32)
    ancestors, depth = reference.tree_ancestors(parents, n_nodes)
    return Tree(parents, n_nodes, depth, ancestors)


def repeated(tree: Tree, batch: int) -> Tree:
    """The first tree of a batch, `batch` times."""
    tensors = (tree.parent, tree.n_nodes, tree.depth, tree.ancestors)
    return Tree(*(t[:1].expand(batch, *t.shape[1:]).contiguous() for t in tensors))


def make_walk(
    seed: int = 0,
    *,
    batch: int = 3,
    nodes: int = 12,
    vocab: int = 6,
    kind: str = "random",
    counts: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
    poison: bool = True,
    device: str = "cpu",
) -> Walk:
    """Few tokens make long walks. Rows past n_nodes hold NaN when `poison` is set."""
    generator = torch.Generator().manual_seed(seed)
    tree = tree_of(random_parents(batch, nodes, kind, generator), counts)
    tokens = torch.randint(0, vocab, (batch, nodes), generator=generator)
    logits = (spread * torch.randn(batch, nodes, vocab, generator=generator)).to(dtype)
    if poison:
        unused = torch.arange(nodes) >= tree.n_nodes[:, None]
        logits[unused] = torch.nan
    return Walk(tokens, tree, logits).to(device)


def assert_accepted(got: Accepted, want: Accepted) -> None:
    for name, dtype in (("path", torch.int32), ("length", torch.int32), ("next_token", torch.int64)):
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == dtype
        assert torch.equal(a.cpu(), b.cpu()), (name, a, b)
