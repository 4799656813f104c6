"""What drawing tokens and verifying trees mean, in plain torch and fp64. Slow and clear; the tests' oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tranche.tree.accepted import Accepted
from tranche.tree.structure import Tree

WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random words for four words of counter and two of key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & WORD,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that the token at this position is drawn with, in 53 bits."""
    low, high, _, _ = philox((position & WORD, position >> 32 & WORD, 0, 0), (seed & WORD, seed >> 32 & WORD))
    return ((high << 32 | low) >> 11) * 2.0**-53


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that `sample` draws from, float64 [V], of one row of logits [V]."""
    x = logits.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # stable: of equal logits the lower id comes first
    ordered, ids = torch.sort(x, descending=True, stable=True)
    if temperature == 0 or ordered[0] == -torch.inf:
        return torch.zeros_like(x).index_fill_(0, ids[:1], 1.0)
    if ordered[0] == torch.inf:
        ordered = torch.where(ordered == torch.inf, 0.0, -torch.inf)
    weights = torch.exp((ordered - ordered[0]) / temperature)
    if top_k > 0:
        weights[top_k:] = 0
    before = torch.cumsum(weights, 0) - weights
    keep = before < top_p * weights.sum() if top_p < 1 else torch.ones_like(before, dtype=torch.bool)
    keep[0] = True
    weights = torch.where(keep, weights, 0)
    return torch.zeros_like(x).scatter_(0, ids, weights / weights.sum())


def draw(p: Tensor, u: float) -> int:
    """The first token up to which p sums to more than u: never one of probability 0."""
    cumulative = torch.cumsum(p, 0)
    token = int(torch.searchsorted(cumulative, torch.tensor(u, dtype=p.dtype), right=True))
    return min(token, int(p.nonzero()[-1]))


def is_near_a_step(p: Tensor, u: float) -> bool:
    """Whether u is so near to where the drawn token changes that fp32 and fp64 may draw different ones."""
    return bool((torch.cumsum(p, 0) - u).abs().min() < 1e-5)


def _row_options(b: int, batch: int, device: torch.device, **options: Tensor | float) -> dict[str, float]:
    """The numbers that sequence b draws with, rounded as the op's tensors round them."""
    row: dict[str, float] = {}
    for name, value in options.items():
        if not isinstance(value, Tensor):
            value = torch.arange(batch) * (name == "seed") + torch.full((batch,), value)
        row[name] = value[b].float().item() if name in ("temperature", "top_p") else int(value[b])
    return row


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | float,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    seed: Tensor | int,
    position: Tensor | int,
) -> Tensor:
    """See `tranche.tree.sample`."""
    batch = logits.size(0)
    out = logits.new_empty(batch, dtype=torch.int64)
    for b in range(batch):
        row = _row_options(
            b,
            batch,
            logits.device,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            position=position,
        )
        p = probabilities(logits[b], row["temperature"], int(row["top_k"]), row["top_p"])
        out[b] = draw(p, uniform(int(row["seed"]), int(row["position"])))
    return out


def _children(tree: Tree, b: int, node: int) -> list[int]:
    return [i for i in range(node + 1, int(tree.n_nodes[b])) if int(tree.parent[b, i]) == node]


def _accepted(like: Tensor, nodes: int, paths: list[list[int]], next_tokens: list[int]) -> Accepted:
    path = torch.full((len(paths), nodes), -1, dtype=torch.int32)
    for b, visited in enumerate(paths):
        path[b, : len(visited)] = torch.tensor(visited, dtype=torch.int32)
    length = torch.tensor([max(len(visited) - 1, 0) for visited in paths], dtype=torch.int32)
    next_token = torch.tensor(next_tokens, dtype=torch.int64)
    return Accepted(path.to(like.device), length.to(like.device), next_token.to(like.device))


def verify_greedy(tokens: Tensor, tree: Tree, target: Tensor) -> Accepted:
    """See `tranche.tree.verify_greedy`."""
    batch, nodes = tokens.shape
    paths: list[list[int]] = []
    next_tokens: list[int] = []
    for b in range(batch):
        paths.append([])
        next_tokens.append(-1)
        node = 0 if int(tree.n_nodes[b]) else None
        while node is not None:
            paths[b].append(node)
            next_tokens[b] = int(target[b, node])
            matches = (i for i in _children(tree, b, node) if int(tokens[b, i]) == next_tokens[b])
            node = next(matches, None)
    return _accepted(tokens, nodes, paths, next_tokens)


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
    """See `tranche.tree.verify_sample`."""
    batch, nodes = tokens.shape
    paths: list[list[int]] = []
    next_tokens: list[int] = []
    for b in range(batch):
        row = _row_options(
            b,
            batch,
            logits.device,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            position=position,
        )
        paths.append([])
        next_tokens.append(-1)
        node = 0 if int(tree.n_nodes[b]) else None
        while node is not None:
            p = probabilities(logits[b, node], row["temperature"], int(row["top_k"]), row["top_p"])
            next_tokens[b] = draw(p, uniform(int(row["seed"]), int(row["position"]) + len(paths[b])))
            paths[b].append(node)
            matches = (i for i in _children(tree, b, node) if int(tokens[b, i]) == next_tokens[b])
            node = next(matches, None)
    return _accepted(tokens, nodes, paths, next_tokens)


def walk_law(tokens: list[int], parents: list[int], rows: Tensor) -> dict[tuple[tuple[int, ...], int], float]:
    """The joint law of (path, next token) of one tree's walk, by enumeration.

    Args:
        tokens: of the nodes.
        parents: of the nodes, -1 at the root.
        rows: float64 [N, V], the distribution that each node's token is drawn from.
    """
    law: dict[tuple[tuple[int, ...], int], float] = {}
    waiting: list[tuple[tuple[int, ...], float]] = [((0,), 1.0)]
    while waiting:
        path, chance = waiting.pop()
        for token, p in enumerate(rows[path[-1]].tolist()):
            if p == 0:
                continue
            matches = (i for i in range(len(tokens)) if parents[i] == path[-1] and tokens[i] == token)
            child = next(matches, None)
            if child is None:
                law[path, token] = chance * p
            else:
                waiting.append(((*path, child), chance * p))
    return law


def verify_typical(
    tokens: Tensor, tree: Tree, logits: Tensor, *, epsilon: float, delta: float, temperature: float = 1.0
) -> Accepted:
    """See `tranche.tree.verify_typical`."""
    batch, nodes = tokens.shape
    paths: list[list[int]] = []
    next_tokens: list[int] = []
    for b in range(batch):
        best: tuple[int, float, int] | None = None
        path_of: dict[int, list[int]] = {}
        score_of: dict[int, float] = {}
        for node in range(int(tree.n_nodes[b])):
            if node == 0:
                path_of[0], score_of[0] = [0], 0.0
            parent = int(tree.parent[b, node])
            if parent in path_of:
                row = logits[b, parent].double()
                p = probabilities(row, temperature)
                entropy = float(torch.special.entr(p).sum())
                token = int(tokens[b, node])
                chance = float(p[token]) if 0 <= token < len(p) else 0.0
                something = bool((row > -torch.inf).any())
                if something and chance > min(epsilon, delta * math.exp(-entropy)):
                    path_of[node] = [*path_of[parent], node]
                    score_of[node] = score_of[parent] + math.log(chance)
            if node in path_of:
                candidate = (len(path_of[node]), score_of[node], -node)
                best = candidate if best is None else max(best, candidate)
        if best is None:
            paths.append([])
            next_tokens.append(-1)
        else:
            paths.append(path_of[-best[2]])
            next_tokens.append(int(probabilities(logits[b, -best[2]], 0.0).argmax()))
    return _accepted(tokens, nodes, paths, next_tokens)
