"""Rows of the family `tree` on growing a tree and keeping its accepted path.

Baselines: `torch`, the batched form in plain torch; `published`, a sequence after the other with loops in Python as
the published codes have them (it reads values back, so it cannot be captured on CUDA and is left out there).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Row, Workload
from tranche.tree import Accepted, Tree, compact_cache_, expand_beam, reference, select_tree, write_cache_

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def with_published(calls: dict[str, Callable], published: Callable, device: str) -> dict[str, Callable]:
    """The baselines of a device."""
    return calls | ({"published": published} if device == "cpu" else {})


# ---- expand_beam ----------------------------------------


def torch_expand(logprobs: Tensor, beam_scores: Tensor, k: int) -> Tensor:
    best, tokens = logprobs.topk(k, dim=-1)
    scores = best.float() + beam_scores[:, :, None]
    kept, flat = scores.flatten(1).topk(k, dim=-1)
    flat.div(k, rounding_mode="floor")
    tokens.flatten(1).gather(1, flat)
    return kept


def published_expand(logprobs: Tensor, beam_scores: Tensor, k: int) -> Tensor:
    return torch.cat(
        [torch_expand(logprobs[b : b + 1], beam_scores[b : b + 1], k) for b in range(logprobs.size(0))]
    )


def expand_row(batch: int, beams: int, vocab: int, dtype: str, device: str, *, quick: bool = False) -> Row:
    """One level of growth, k = 10 as EAGLE-2 has it."""
    k = 10

    def build(buffers: int) -> Workload:
        first = torch.log_softmax(3 * torch.randn(batch, beams, vocab, device=device), dim=-1).to(
            DTYPES[dtype]
        )
        logprobs = [first.clone() for _ in range(buffers)]
        scores = -torch.rand(batch, beams, device=device)
        # a full sort of the whole batch, as the reference has it, would take longer than the row
        expected = torch.cat(
            [
                reference.expand_beam(first[b : b + 1], scores[b : b + 1], k).scores
                for b in range(min(batch, 2))
            ]
        )
        return Workload(
            ours=lambda i: expand_beam(logprobs[i], scores, k).scores,
            baselines=with_published(
                {"torch": lambda i: torch_expand(logprobs[i], scores, k)},
                lambda i: published_expand(logprobs[i], scores, k),
                device,
            ),
            error=lambda out: float((out[:2] - expected).abs().max()),
            tolerance=0.0,
        )

    return Row(
        op="tree_expand_beam",
        shape=f"V{vocab} B{batch} K{beams}",
        dtype=dtype,
        bytes_read=batch * beams * vocab * DTYPES[dtype].itemsize,
        operations=batch * beams * vocab,
        math="fp32",
        build=build,
        quick=quick,
    )


# ---- select_tree ----------------------------------------


def random_pool(batch: int, k: int, depth: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A pool of k + depth * k * k candidates with falling scores along every path."""
    generator = torch.Generator().manual_seed(0)
    scores = -torch.rand(batch, k, generator=generator)
    parents = torch.full((batch, k), -1)
    beam = torch.arange(k).expand(batch, k)
    for _ in range(depth):
        start = scores.size(1)
        up = beam.repeat_interleave(k, dim=1)
        children = scores.gather(1, up) - torch.rand(batch, k * k, generator=generator)
        scores, parents = torch.cat([scores, children], dim=1), torch.cat([parents, up], dim=1)
        beam = start + children.topk(k, dim=1).indices
    tokens = torch.randint(0, 32000, scores.shape, generator=generator)
    return scores.to(device), parents.int().to(device), tokens.to(device), tokens[:, 0].clone().to(device)


def torch_select(
    scores: Tensor, parents: Tensor, tokens: Tensor, roots: Tensor, nodes: int
) -> tuple[Tensor, Tensor]:
    """Top-k, and ancestors by repeated squaring of the adjacency."""
    index = scores.topk(nodes - 1, dim=1).indices.sort(dim=1).values
    up = parents.long().gather(1, index)
    parent = torch.where(up < 0, 0, torch.searchsorted(index, up) + 1)
    torch.cat([roots[:, None], tokens.gather(1, index)], dim=1)
    mask = torch.eye(nodes, dtype=torch.bool, device=scores.device).repeat(scores.size(0), 1, 1)
    mask[:, 1:].scatter_(2, parent[:, :, None], True)
    reach = mask.float()
    for _ in range(math.ceil(math.log2(nodes))):
        reach = (reach @ reach > 0).float()
    return index, reach > 0


def published_select(
    scores: Tensor, parents: Tensor, tokens: Tensor, roots: Tensor, nodes: int
) -> tuple[Tensor, Tensor]:
    """As EAGLE-2 does it, with the mask's rows built one by one."""
    indices, masks = [], []
    for b in range(scores.size(0)):
        index = scores[b].topk(nodes - 1).indices.sort().values
        up = parents[b].long()[index]
        parent = torch.where(up < 0, 0, torch.searchsorted(index, up) + 1).tolist()
        torch.cat([roots[b : b + 1], tokens[b][index]])
        mask = torch.eye(nodes).bool()
        for i in range(nodes - 1):
            mask[i + 1].add_(mask[parent[i]])
        indices.append(index)
        masks.append(mask)
    return torch.stack(indices), torch.stack(masks)


def select_row(batch: int, nodes: int, device: str, *, quick: bool = False) -> Row:
    """Jakiro's pool, k = 10 and five more levels, for N <= 64; a pool of k = 16 for larger trees."""
    k, depth = (10, 5) if nodes <= 64 else (16, 5)
    candidates = k + depth * k * k

    def build(buffers: int) -> Workload:
        pool = random_pool(batch, k, depth, device)
        want_tree, _, want_index = reference.select_tree(*pool, nodes)
        want = torch.cat([want_index[:, 1:].flatten(), want_tree.dense_mask().flatten().int()])

        def ours(i: int) -> tuple[Tree, Tensor, Tensor]:
            return select_tree(*pool, nodes)

        def flat(out) -> Tensor:
            if isinstance(out[0], Tree):
                return torch.cat([out[2][:, 1:].flatten(), out[0].dense_mask().flatten().int()])
            return torch.cat([out[0].flatten(), out[1].flatten().int()])

        return Workload(
            ours=ours,
            baselines=with_published(
                {"torch": lambda i: torch_select(*pool, nodes)},
                lambda i: published_select(*pool, nodes),
                device,
            ),
            error=lambda out: float((out != want).sum()),
            tolerance=0.0,
            result=flat,
        )

    return Row(
        op="tree_select",
        shape=f"C{candidates} B{batch} N{nodes}",
        dtype="fp32",
        bytes_read=batch * candidates * 16,
        operations=batch * candidates,
        math="fp32",
        build=build,
        quick=quick,
    )


# ---- compact_cache_ ----------------------------------------


def torch_compact(caches: list[Tensor], accepted: Accepted, seqlens: Tensor) -> None:
    place = torch.arange(accepted.path.size(1), device=seqlens.device)
    to = seqlens[:, None] + place
    source = torch.where(place <= accepted.length[:, None], seqlens[:, None] + accepted.path, to).long()
    row = torch.arange(seqlens.numel(), device=seqlens.device)[:, None]
    for cache in caches:
        cache[row, to] = cache[row, source]
    seqlens += accepted.length + 1


def published_compact(caches: list[Tensor], accepted: Accepted, seqlens: Tensor) -> None:
    for b, (start, length) in enumerate(zip(seqlens.tolist(), accepted.length.tolist(), strict=True)):
        select = start + accepted.path[b, : length + 1]
        for cache in caches:
            cache[b, start : start + length + 1].copy_(cache[b, select])
        seqlens[b] += length + 1


def compact_row(batch: int, nodes: int, device: str, *, layers: int = 32, quick: bool = False) -> Row:
    """Llama-3-8B's caches (8 heads of 128, bf16), four accepted tokens a step."""
    length = 4

    def build(buffers: int) -> Workload:
        # two models' caches, far larger than what a call touches
        buffers = 2
        shape = (batch, 64 + nodes, 8, 128)
        first = torch.randn(shape, device=device).bfloat16()
        caches = [[first.clone() for _ in range(2 * layers)] for _ in range(buffers)]
        path = torch.full((batch, nodes), -1, dtype=torch.int32, device=device)
        path[:, : length + 1] = torch.tensor([0, *range(nodes - length, nodes)], dtype=torch.int32)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        accepted = Accepted(path, lengths, torch.zeros(batch, dtype=torch.int64, device=device))
        seqlens = torch.full((batch,), 60, dtype=torch.int32, device=device)
        original = [cache.clone() for cache in caches[0][:2]]
        expected = [cache.clone() for cache in original]
        reference.compact_cache_(expected, accepted, seqlens.clone())

        def call(function: Callable) -> Callable:
            def run(i: int) -> Callable:
                function(caches[i % buffers], accepted, seqlens.clone())
                return function

            return run

        def error(function: Callable) -> float:
            # calls change their buffers: what is checked is the same function on fresh ones
            fresh = [cache.clone() for cache in original]
            advanced = seqlens.clone()
            function(fresh, accepted, advanced)
            wrong = sum(int((a != b).sum()) for a, b in zip(fresh, expected, strict=True))
            return float(wrong + int((advanced != seqlens + length + 1).sum()))

        return Workload(
            ours=call(compact_cache_),
            baselines=with_published({"torch": call(torch_compact)}, call(published_compact), device),
            error=error,
            tolerance=0.0,
        )

    return Row(
        op="tree_compact_cache_",
        shape=f"llama-3-8b B{batch} N{nodes}",
        dtype="bf16",
        bytes_read=batch * 2 * layers * length * 8 * 128 * 2,
        operations=0,
        math="fp32",
        build=build,
        quick=quick,
    )


# ---- write_cache_ ----------------------------------------


def rotated(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers rotates keys [B, N, H, D] by tables [B, N, D]."""
    half = k.size(-1) // 2
    turned = torch.cat([-k[..., half:], k[..., :half]], dim=-1)
    return k * cos[:, :, None] + turned * sin[:, :, None]


def write_row(batch: int, nodes: int, device: str, *, rope: bool, quick: bool = False) -> Row:
    """One layer of Llama-3-8B (8 heads of 128, bf16), with and without rotation of the keys by depth."""

    def build(buffers: int) -> Workload:
        length, shape = 64, (batch, nodes, 8, 128)
        k, v = torch.randn(2, *shape, device=device).bfloat16()
        buffers = min(buffers, 8)
        caches = torch.zeros(buffers, 2, batch, length + nodes, 8, 128, dtype=torch.bfloat16, device=device)
        tree = Tree.chain(nodes, batch, device)
        seqlens = torch.full((batch,), length, dtype=torch.int32, device=device)
        angles = torch.arange(length + nodes, device=device)[:, None] / 10000 ** (
            torch.arange(64, device=device) / 64
        )
        cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))
        row = torch.arange(batch, device=device)[:, None]

        def ours(i: int) -> Tensor:
            cache = caches[i % buffers]
            write_cache_(k, v, cache[0], cache[1], seqlens, tree, rope=(cos, sin) if rope else None)
            return cache

        def plain(i: int) -> Tensor:
            cache, slot = caches[i % buffers], tree.positions(seqlens)
            cache[0][row, slot] = rotated(k.float(), cos[slot], sin[slot]).bfloat16() if rope else k
            cache[1][row, slot] = v
            return cache

        keys = rotated(k.double(), *(t[length:].expand(batch, -1, -1).double() for t in (cos, sin)))
        want = torch.stack([keys if rope else k.double(), v.double()])
        return Workload(
            ours=ours,
            baselines={"torch": plain},
            error=lambda cache: float((cache[:, :, length:].double() - want).abs().max()),
            tolerance=4 * torch.finfo(torch.bfloat16).eps if rope else 0.0,
        )

    return Row(
        op="tree_write_cache_",
        shape=f"llama-3-8b B{batch} N{nodes}" + (" rope" if rope else ""),
        dtype="bf16",
        bytes_read=2 * batch * nodes * 8 * 128 * 2,
        operations=0,
        math="fp32",
        build=build,
        quick=quick,
    )


def rows(device: str) -> list[Row]:
    """All rows for a device."""
    table = []
    for vocab in (32_000, 128_256):
        table.append(expand_row(1, 10, vocab, "bf16", device, quick=vocab > 100_000))
        table.append(expand_row(1, 10, vocab, "fp32", device))
        table.append(expand_row(8, 10, vocab, "bf16", device))
    table.append(expand_row(1, 1, 128_256, "bf16", device))
    for vocab in (32_000, 128_256):
        table.append(expand_row(64, 10, vocab, "bf16", device))
    for batch, nodes in ((1, 8), (1, 60), (8, 64), (64, 8), (1, 256), (64, 256)):
        table.append(select_row(batch, nodes, device, quick=nodes == 60))
        table.append(compact_row(batch, nodes, device, quick=nodes == 60))
    for batch, nodes in ((1, 60), (8, 64), (64, 256)):
        for rope in (False, True):
            table.append(write_row(batch, nodes, device, rope=rope, quick=nodes == 60 and rope))
    return table
