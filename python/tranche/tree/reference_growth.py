"""What growing and keeping mean, in plain torch: see `tranche.tree.reference`, which offers these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tranche.tree.accepted import Accepted
from tranche.tree.growth import Candidates, Level
from tranche.tree.reference_structure import tree_ancestors
from tranche.tree.structure import Tree


def expand_beam(logprobs: Tensor, beam_scores: Tensor, k: int) -> Level:
    """See `tranche.tree.expand_beam`; sums are rounded to the dtype of beam_scores, as there."""
    batch, beams, _ = logprobs.shape
    cumulative = logprobs.to(beam_scores.dtype) + beam_scores[:, :, None]
    cumulative = torch.where(cumulative.isnan(), -torch.inf, cumulative)
    # a stable sort keeps the lower index first among equals
    scores, tokens = (t[:, :, :k] for t in torch.sort(cumulative, dim=2, descending=True, stable=True))
    flat = scores.reshape(batch, beams * k)
    best, chosen = (t[:, :k] for t in torch.sort(flat, dim=1, descending=True, stable=True))
    parent_beam = chosen.div(max(k, 1), rounding_mode="floor").to(torch.int32)
    return Level(best, parent_beam, tokens.reshape(batch, -1).gather(1, chosen), Candidates(scores, tokens))


def select_tree(
    scores: Tensor, parents: Tensor, tokens: Tensor, root_tokens: Tensor, n_nodes: int
) -> tuple[Tree, Tensor, Tensor]:
    """See `tranche.tree.select_tree`."""
    batch, candidates = scores.shape
    kept = min(n_nodes - 1, candidates)
    parent = torch.full((batch, n_nodes), -1, dtype=torch.int32, device=scores.device)
    index = torch.full_like(parent, -1)
    node_tokens = torch.zeros(batch, n_nodes, dtype=torch.int64, device=scores.device)
    node_tokens[:, 0] = root_tokens
    for b in range(batch):
        keys: list[float] = []
        for c in range(candidates):
            score, up = float(scores[b, c]), int(parents[b, c])
            key = score if score == score else -torch.inf
            keys.append(min(key, keys[up]) if up >= 0 else key)
        chosen = sorted(sorted(range(candidates), key=lambda c: (-keys[c], c))[:kept])
        node_of = {c: node for node, c in enumerate(chosen, start=1)} | {-1: 0}
        for c in chosen:
            node = node_of[c]
            parent[b, node] = node_of[int(parents[b, c])]
            node_tokens[b, node] = tokens[b, c]
            index[b, node] = c
    counts = torch.full((batch,), kept + 1, dtype=torch.int32, device=scores.device)
    ancestors, depth = tree_ancestors(parent, counts)
    return Tree(parent, counts, depth, ancestors), node_tokens, index


def slot_index(sequence: int, slot: int, cache: Tensor, block_table: Tensor | None) -> tuple[int, int]:
    """The first two indices of a slot in a contiguous or a paged cache."""
    if block_table is None:
        return sequence, slot
    page_size = cache.size(1)
    return int(block_table[sequence, slot // page_size]), slot % page_size


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
    compute_dtype: torch.dtype = torch.float64,
) -> None:
    """See `tranche.tree.write_cache_`.

    Args:
        compute_dtype: what rotation and quantisation are computed in.
    """
    for b in range(k.size(0)):
        for i in range(int(tree.n_nodes[b])):
            place = slot_index(b, int(cache_seqlens[b]) + i, k_cache, block_table)
            key, value = k[b, i].to(compute_dtype), v[b, i].to(compute_dtype)
            if rope is not None:
                position = int(cache_seqlens[b]) + int(tree.depth[b, i])
                cos, sin = (table[position].to(compute_dtype) for table in rope)
                if cos.numel() < key.size(-1):
                    cos, sin = cos.repeat(2), sin.repeat(2)
                low, high = key.chunk(2, dim=-1)
                key = key * cos + torch.cat([-high, low], dim=-1) * sin
            for states, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
                stored = states if scale is None else states / scale.to(compute_dtype)[:, None]
                if cache.dtype == torch.float8_e4m3fn:
                    stored = stored.clamp(-448, 448)
                cache[place] = stored.to(cache.dtype)


def compact_cache_(
    caches: Sequence[Tensor], accepted: Accepted, cache_seqlens: Tensor, *, block_table: Tensor | None = None
) -> None:
    """See `tranche.tree.compact_cache_`."""
    for b in range(accepted.path.size(0)):
        if int(accepted.path[b, 0]) < 0:
            continue
        base, length = int(cache_seqlens[b]), int(accepted.length[b])
        for j in range(1, length + 1):
            for cache in caches:
                source = slot_index(b, base + int(accepted.path[b, j]), cache, block_table)
                cache[slot_index(b, base + j, cache, block_table)] = cache[source].clone()
        cache_seqlens[b] = base + length + 1
