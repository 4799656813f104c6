"""Typed functions that draw tokens and verify draft trees; each calls the raw op of flat tensors behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from tranche import _library
from tranche.tree.accepted import Accepted
from tranche.tree.structure import Tree

Number = int | float


def _per_sequence(value: Tensor | Number, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number for all sequences as a tensor [B]; tensors pass as they are, and the op checks them."""
    if isinstance(value, Tensor):
        return value
    return torch.full((batch,), value, dtype=dtype, device=device)


def _sampling(
    logits: Tensor,
    temperature: Tensor | float,
    top_k: Tensor | int,
    top_p: Tensor | float,
    seed: Tensor | int,
    position: Tensor | int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors [B] of the raw ops, made without looking at any value on the device."""
    batch, device = logits.size(0), logits.device
    if not isinstance(seed, Tensor):
        # sequences must not share their random numbers
        seed = torch.arange(batch, dtype=torch.int64, device=device) + seed
    return (
        _per_sequence(temperature, batch, torch.float32, device),
        _per_sequence(top_k, batch, torch.int32, device),
        _per_sequence(top_p, batch, torch.float32, device),
        seed,
        _per_sequence(position, batch, torch.int64, device),
    )


def verify_greedy(tokens: Tensor, tree: Tree, target: Tensor) -> Accepted:
    """The path that follows the target's own choice at every node.

    Args:
        tokens: int64 [B, N], the draft's token at each node.
        tree: the trees, of N nodes each at most.
        target: int64 [B, N], the target's token after each node (the argmax of its logits).

    Returns:
        The walk from the root to the first child whose token is the target's, as far as there is one. Of siblings
        with equal tokens the first wins. Nodes past n_nodes are never visited.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
        IndexError: a bad parent or count (CPU, and elsewhere under TRANCHE_CHECK=1).
    """
    return Accepted(*_library.ops().tree_verify_greedy(tokens, tree.parent, tree.n_nodes, target))


@_library.register_fake("tree_verify_greedy")
def _(tokens: Tensor, parent: Tensor, n_nodes: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _new_accepted(target)


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | float,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    seed: Tensor | int,
    position: Tensor | int,
) -> Tensor:
    """Draw one token per sequence.

    p = softmax(logits / temperature), cut to the top_k likeliest tokens, then, renormalised, to the shortest run of
    the likeliest whose sum reaches top_p: in the order of falling logit and rising id a token is kept while the sum
    before it is below top_p. The token is the first, by id, up to which p sums to more than u, where u in [0, 1) is
    a function of (seed, position) alone: Philox4x32-10. Sums are exact (integers), so a row's token depends on
    nothing but the row and the numbers beside it. A token 2^39 times less likely than the likeliest is never drawn.

    NaN counts as -inf, and no token of logit -inf is drawn, unless all are: then token 0. Tokens of logit +inf share
    the probability equally.

    Args:
        logits: [B, V], float32, float16 or bfloat16, any strides but a contiguous last dimension; V <= 2^24.
        temperature: float32 [B] or a number, >= 0; 0 takes the largest logit, of equal ones the lowest id.
        top_k: int32 [B] or a number, >= 0; 0 keeps all.
        top_p: float32 [B] or a number, in [0, 1]; 1 keeps all, 0 the likeliest.
        seed: int64 [B], or a number: then sequence b has seed + b.
        position: int64 [B] or a number, the absolute position of the drawn token.

    Returns:
        int64 [B].

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
        IndexError: a temperature, top_k or top_p out of range (CPU, and elsewhere under TRANCHE_CHECK=1; otherwise
            a bad temperature counts as 0, a bad top_k or a NaN in top_p as no cut).
    """
    return _library.ops().tree_sample(logits, *_sampling(logits, temperature, top_k, top_p, seed, position))


@_library.register_fake("tree_sample")
def _(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    return logits.new_empty((logits.size(0),), dtype=torch.int64)


def verify_sample(
    tokens: Tensor,
    tree: Tree,
    logits: Tensor,
    *,
    temperature: Tensor | float,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    seed: Tensor | int,
    position: Tensor | int,
) -> Accepted:
    """The path that follows the target's own draws: exactly the target's distribution.

    At each visited node a token is drawn as `sample` draws it from the node's row, at position + depth; the walk goes
    on to the first child with that token, and where there is none it ends with the token as next_token. What comes
    out is what `sample` would have drawn token by token, whatever the draft: equal logits, seed and position give
    equal tokens. Only the visited rows of logits, length + 1 of them, are read.

    Args:
        tokens: int64 [B, N], the draft's token at each node.
        tree: the trees, of N nodes each at most.
        logits: [B, N, V], the target's logits after each node; float32, float16 or bfloat16, any strides but a
            contiguous last dimension.
        temperature: see `sample`, as for the following three.
        top_k: see `sample`.
        top_p: see `sample`.
        seed: see `sample`.
        position: int64 [B] or a number, the absolute position of the token after the root.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
        IndexError: as `sample`; or a bad parent or count.
    """
    return Accepted(
        *_library.ops().tree_verify_sample(
            tokens,
            tree.parent,
            tree.n_nodes,
            logits,
            *_sampling(logits, temperature, top_k, top_p, seed, position),
        )
    )


@_library.register_fake("tree_verify_sample")
def _(
    tokens: Tensor,
    parent: Tensor,
    n_nodes: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_accepted(logits)


def verify_typical(
    tokens: Tensor, tree: Tree, logits: Tensor, *, epsilon: float, delta: float, temperature: float = 1.0
) -> Accepted:
    """Medusa's typical acceptance (arXiv 2401.10774, section 2.3.1). **Lossy**: the text is not the target's.

    With p = softmax(logits / temperature) at a node and H its entropy in nats, a child of token t is accepted if
    p(t) > min(epsilon, delta * exp(-H)) and the node is. The path is the longest of accepted nodes; of equally long
    ones that of the greatest sum of log p, and of these that of the lowest last node. next_token is the largest
    logit's at the last node, of equal ones the lowest id.

    NaN counts as -inf. Tokens of logit +inf share the probability equally. At a node with no other logits than -inf
    no child is accepted, and the next token is 0; so is a child whose token is not in [0, V).

    Args:
        tokens: int64 [B, N], the draft's token at each node.
        tree: the trees, of N nodes each at most.
        logits: [B, N, V], the target's logits after each node; float32, float16 or bfloat16, any strides but a
            contiguous last dimension.
        epsilon: the hard threshold (Medusa: 0.3).
        delta: the factor of the entropy-dependent one (Medusa: 0.09).
        temperature: > 0.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or number.
        IndexError: a bad parent or count (CPU, and elsewhere under TRANCHE_CHECK=1).
    """
    return Accepted(
        *_library.ops().tree_verify_typical(
            tokens, tree.parent, tree.n_nodes, logits, epsilon, delta, temperature
        )
    )


@_library.register_fake("tree_verify_typical")
def _(
    tokens: Tensor,
    parent: Tensor,
    n_nodes: Tensor,
    logits: Tensor,
    epsilon: float,
    delta: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_accepted(logits)


def _new_accepted(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, nodes = like.shape[:2]
    path = like.new_empty((batch, nodes), dtype=torch.int32)
    return path, like.new_empty((batch,), dtype=torch.int32), like.new_empty((batch,), dtype=torch.int64)
