"""Random trees, random caches in every layout, and the rule by which results are judged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tranche.tree import Tree, reference, tree_attention


def random_parents(
    batch: int, nodes: int, kind: str = "random", generator: torch.Generator | None = None
) -> Tensor:
    """Parents int32 [batch, nodes] of trees of one kind: random, chain, star, binary or deep."""
    node = torch.arange(nodes)
    if kind == "chain":
        row = node - 1
    elif kind == "star":
        row = torch.zeros_like(node)
    elif kind == "binary":
        row = (node - 1).div(2, rounding_mode="floor")
    else:
        draw = torch.rand(batch, nodes, generator=generator)
        lowest = (node - 4).clamp(min=0) if kind == "deep" else torch.zeros_like(node)
        row = (lowest + draw * (node - lowest)).long()
    parents = row.expand(batch, nodes).clone().to(torch.int32)
    if nodes:
        parents[:, 0] = -1
    return parents


@dataclass
class Case:
    """One call of tree_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    seqlens: Tensor
    tree: Tree
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **extra: Any) -> Any:
        return tree_attention(self.q, self.k, self.v, self.seqlens, self.tree, **self.options, **extra)

    def reference(self, **extra: Any) -> Any:
        return reference.tree_attention(
            self.q, self.k, self.v, self.seqlens, self.tree, **self.options, **extra
        )

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})

    def to(self, device: str) -> Case:
        options = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in self.options.items()
        }
        tensors = (t.to(device) for t in (self.q, self.k, self.v, self.seqlens))
        return Case(*tensors, self.tree.to(device), options)


def paged(cache: Tensor, page_size: int, permutation: Tensor, max_pages: int) -> tuple[Tensor, Tensor]:
    """The contiguous cache [B, S, H, D] cut in pages and shuffled; spare pages hold NaN."""
    batch, slots, heads, size = cache.shape
    per_sequence = -(-slots // page_size)
    rounded = torch.full((batch, per_sequence * page_size, heads, size), torch.nan).to(cache.dtype)
    rounded[:, :slots] = cache
    pages = torch.full((len(permutation), page_size, heads, size), torch.nan).to(cache.dtype)
    table = torch.full((batch, max_pages), -7, dtype=torch.int32)
    used = permutation[: batch * per_sequence].view(batch, per_sequence)
    pages[used.flatten()] = rounded.view(batch * per_sequence, page_size, heads, size)
    table[:, :per_sequence] = used
    return pages, table


def make_case(
    seed: int = 0,
    *,
    nodes: int = 7,
    lengths: tuple[int, ...] = (300, 17),
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    kind: str = "random",
    n_nodes: tuple[int, ...] | None = None,
    layout: str = "bshd",
    page_size: int | None = None,
    spare_slots: int = 3,
    poison: bool = True,
    device: str = "cpu",
    integers: bool = False,
    **options: Any,
) -> Case:
    """A random case. Slots that nobody may read hold NaN when `poison` is set.

    Args:
        layout: bshd (contiguous), bhsd (as transformers keeps it), interleaved (K and V pages in one tensor).
        page_size: a paged cache of that page size, its pages shuffled.
        integers: q, k and v hold small integers instead of normal deviates.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, (heads_q, heads_kv) = len(lengths), heads
    slots = max((*lengths, 0)) + nodes + spare_slots

    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator).to(dtype)

    parents = random_parents(batch, nodes, kind, generator)
    counts = torch.tensor(n_nodes if n_nodes is not None else [nodes] * batch, dtype=torch.int32)
    # the tree is made on the CPU so that a case is the same for every backend
    ancestors, depth = reference.tree_ancestors(parents, counts)
    tree = Tree(parents, counts, depth, ancestors)
    q = draw(batch, nodes, heads_q, head_dim)
    k, v = draw(batch, slots, heads_kv, head_dim), draw(batch, slots, heads_kv, head_dim)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    if poison:
        for b in range(batch):
            used = lengths[b] + int(counts[b])
            k[b, used:] = torch.nan
            v[b, used:] = torch.nan
    if cache_dtype is not None:
        k, v = k.to(cache_dtype), v.to(cache_dtype)
    if page_size is not None:
        per_sequence = -(-slots // page_size)
        permutation = torch.randperm(batch * per_sequence + 3, generator=generator)
        k, table = paged(k, page_size, permutation, per_sequence + 1)
        v, _ = paged(v, page_size, permutation, per_sequence + 1)
        options["block_table"] = table
    if layout == "bhsd":
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    elif layout == "interleaved":
        k, v = torch.stack([k, v], dim=1).unbind(1)
    return Case(q, k, v, seqlens, tree, options).to(device)


def used_rows(case: Case) -> Tensor:
    """bool [B, N]: the rows below n_nodes."""
    return torch.arange(case.q.size(1), device=case.q.device) < case.tree.n_nodes[:, None]


def assert_correct(case: Case) -> None:
    """The result is as near to the fp64 reference as twice plain torch's error in the same dtype, plus one rounding."""
    out, lse = case.run(return_lse=True)
    assert out.dtype == case.q.dtype and out.shape == case.q.shape and out.is_contiguous()
    assert lse.dtype == torch.float32 and lse.shape == case.q.shape[:3]
    expected, expected_lse = case.reference(return_lse=True)
    plain, plain_lse = case.reference(return_lse=True, compute_dtype=case.q.dtype)
    for got, plain_value, want, unit in (
        (out, plain, expected, torch.finfo(case.q.dtype).eps),
        (lse, plain_lse.float(), expected_lse, torch.finfo(torch.float32).eps),
    ):
        finite = torch.isfinite(want)
        assert torch.equal(torch.isfinite(got), finite)
        assert torch.equal(got[torch.isposinf(want)], want[torch.isposinf(want)].to(got.dtype))
        assert torch.equal(got[torch.isneginf(want)], want[torch.isneginf(want)].to(got.dtype))
        if not finite.any():
            continue
        error = (got.double() - want)[finite].abs().max()
        yardstick = (plain_value.double() - want)[finite].abs().max()
        # the reference is fp64 itself, and no nearer to the truth than an fp64 kernel
        roundings = 32 if got.dtype == torch.float64 else 1
        assert error <= 2 * yardstick + roundings * unit * want[finite].abs().max(), (error, yardstick)
    padding = ~used_rows(case)
    assert (out[padding] == 0).all()
    assert torch.isneginf(lse[padding]).all()


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal bit for bit; -0.0 differs from 0.0."""
    assert a.shape == b.shape and a.dtype == b.dtype
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    different = a.contiguous().view(integer) != b.contiguous().view(integer)
    assert not different.any(), f"{int(different.sum())} of {a.numel()} elements differ"
