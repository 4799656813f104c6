"""The op kernels keep every rule, and give the same bits, in whatever order threads, warps and blocks run."""

from __future__ import annotations

import pytest
import torch

from tests.tree.cases import assert_same_bits, make_case, random_parents
from tranche import testing
from tranche.tree import Tree, tree_attention

SEEDS = 50


def test_tree_ancestors() -> None:
    parents, counts = random_parents(3, 70), torch.tensor([70, 0, 33], dtype=torch.int32)
    want = Tree.from_parent(parents, counts)
    for seed in range(SEEDS):
        with testing.use_simulator(seed=seed):
            got = Tree.from_parent(parents, counts)
        assert torch.equal(got.ancestors, want.ancestors)
        assert torch.equal(got.depth, want.depth)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tree_attention(dtype: torch.dtype, exact: bool) -> None:
    case = make_case(
        nodes=20, lengths=(270, 5), n_nodes=(20, 3), heads=(2, 1), dtype=dtype, page_size=16, exact=exact
    )
    first = None
    for seed in range(SEEDS):
        with testing.use_simulator(seed=seed):
            out = tree_attention(case.q, case.k, case.v, case.seqlens, case.tree, **case.options)
        first = out if first is None else first
        assert_same_bits(out, first)
