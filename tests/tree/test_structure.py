"""Tree and tree_ancestors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tree.cases import random_parents
from tranche.tree import Tree, reference, tree_ancestors


def as_counts(*counts: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int32, device=device)


@pytest.mark.parametrize("kind", ["random", "chain", "star", "binary", "deep"])
@pytest.mark.parametrize("nodes", [1, 2, 31, 32, 33, 63, 64, 65, 364])
def test_ancestors_match_the_reference(backend, kind, nodes):
    parents = random_parents(3, nodes, kind).to(backend.device)
    counts = as_counts(nodes, nodes // 2, 0, device=backend.device)
    got, want = tree_ancestors(parents, counts), reference.tree_ancestors(parents, counts)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_thousand_nodes(backend):
    for kind in ("random", "chain"):
        parents = random_parents(1, 1024, kind).to(backend.device)
        counts = as_counts(1024, device=backend.device)
        for a, b in zip(
            tree_ancestors(parents, counts), reference.tree_ancestors(parents, counts), strict=True
        ):
            assert torch.equal(a, b)


@given(st.integers(0, 3), st.integers(0, 140), st.integers(0, 2**31))
def test_ancestors_property(batch, nodes, seed):
    generator = torch.Generator().manual_seed(seed)
    parents = random_parents(batch, nodes, generator=generator)
    counts = torch.randint(0, nodes + 1, (batch,), generator=generator).to(torch.int32)
    for a, b in zip(tree_ancestors(parents, counts), reference.tree_ancestors(parents, counts), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("batch", "nodes"), [(0, 5), (2, 0), (0, 0)])
def test_empty(backend, batch, nodes):
    parents = torch.zeros(batch, nodes, dtype=torch.int32, device=backend.device)
    tree = Tree.from_parent(parents)
    assert tree.ancestors.shape == (batch, nodes, (nodes + 63) // 64)
    assert tree.depth.shape == (batch, nodes)
    assert tree.dense_mask().shape == (batch, nodes, nodes)
    assert tree.paths().shape[0] == batch


def test_from_choices_follows_medusas_order(backend):
    tree = Tree.from_choices([(1,), (0, 1), (0,), (0, 0), (0, 1, 0)], batch=2, device=backend.device)
    assert tree.parent.tolist() == [[-1, 0, 0, 1, 1, 4]] * 2
    assert tree.depth.tolist() == [[0, 1, 1, 2, 2, 3]] * 2
    assert tree.paths().tolist() == [[[0, 2, -1, -1], [0, 1, 3, -1], [0, 1, 4, 5]]] * 2
    assert tree.positions(as_counts(10, 20, device=backend.device)).tolist() == [
        [10, 11, 11, 12, 12, 13],
        [20, 21, 21, 22, 22, 23],
    ]
    assert tree.positions(as_counts(1, 2, device=backend.device)).dtype == torch.int64


def test_dense_mask_is_the_transitive_closure(backend):
    parents = random_parents(2, 70).to(backend.device)
    tree = Tree.from_parent(parents, as_counts(70, 66, device=backend.device))
    mask = tree.dense_mask()
    for b, count in enumerate((70, 66)):
        for i in range(70):
            want = set()
            node = i if i < count else -1
            while node >= 0:
                want.add(node)
                node = int(parents[b, node])
            assert set(mask[b, i].nonzero().flatten().tolist()) == want


def test_paths_of_ragged_trees(backend):
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 7, 7]], dtype=torch.int32, device=backend.device)
    tree = Tree.from_parent(parents, as_counts(4, 2, device=backend.device))
    assert tree.paths().tolist() == [[[0, 2, -1], [0, 1, 3]], [[0, 1, -1], [-1, -1, -1]]]
    assert tree.paths().dtype == torch.int32


def test_chain_is_causal(backend):
    mask = Tree.chain(65, batch=2, device=backend.device).dense_mask()
    assert torch.equal(mask.cpu(), torch.ones(65, 65, dtype=torch.bool).tril().expand(2, 65, 65))


@pytest.mark.parametrize("bad", [(1, 1), (2, 5), (0, -1), (2, -3)])
def test_a_parent_that_is_no_parent(backend, bad, monkeypatch):
    node, parent = bad
    if node == 0:
        parent = 0
    parents = torch.tensor([[-1, 0, 1, 2]], dtype=torch.int32, device=backend.device)
    parents[0, node] = parent
    if backend.name == "cpu":
        with pytest.raises(
            IndexError, match=rf"expected parent\[0, {node}\].*got {parent}\. Number the nodes"
        ):
            Tree.from_parent(parents)
        return
    # elsewhere such a node hangs under the root, and the root stays the root
    tree = Tree.from_parent(parents)
    depth = [0, 1, 2, 3] if node == 0 else {1: [0, 1, 2, 3], 2: [0, 1, 1, 2]}[node]
    assert tree.depth.tolist() == [depth]
    monkeypatch.setenv("TRANCHE_CHECK", "1")
    with pytest.raises(IndexError, match=rf"expected parent\[0, {node}\]"):
        Tree.from_parent(parents)


def test_a_count_past_the_row(backend):
    parents = torch.tensor([[-1, 0]], dtype=torch.int32, device=backend.device)
    for count, clamped in ((3, [0, 1]), (-1, [0, 0])):
        counts = as_counts(count, device=backend.device)
        if backend.name == "cpu":
            with pytest.raises(IndexError, match=rf"n_nodes\[0\] in \[0, 2\], got {count}"):
                Tree.from_parent(parents, counts)
        else:
            assert Tree.from_parent(parents, counts).depth.tolist() == [clamped]


def test_bad_input_by_name(backend):
    parents = random_parents(2, 3).to(backend.device)
    counts = as_counts(3, 3, device=backend.device)
    wrong = [
        (parents.long(), counts, "parent of dtype torch.int32, got torch.int64"),
        (parents[0], counts, r"parent of shape \[B, N\], got \[3\]"),
        (parents, counts.long(), "n_nodes of dtype torch.int32, got torch.int64"),
        (parents, counts[:1], r"n_nodes of shape \[B\] = \[2\], got \[1\]"),
        (parents.T.contiguous().T, counts, r"expected parent\.stride\(-1\) == 1, got 2"),
        (torch.zeros(1, 1025, dtype=torch.int32, device=backend.device), counts[:1], "at most 1024 nodes"),
    ]
    for parent, n_nodes, message in wrong:
        with pytest.raises(ValueError, match=message):
            tree_ancestors(parent, n_nodes)


def test_choices_that_are_no_tree():
    with pytest.raises(ValueError, match=r"expected the parent \(1,\) of \(1, 0\)"):
        Tree.from_choices([(0,), (1, 0)])
    for repeated in ([(0,), (0,)], [()]):
        with pytest.raises(ValueError, match="expected distinct"):
            Tree.from_choices(repeated)


def test_opcheck(backend):
    parents = random_parents(2, 70).to(backend.device)
    torch.library.opcheck(
        backend.ops().tree_ancestors.default, (parents, as_counts(70, 3, device=backend.device))
    )


def test_compiles_in_one_graph(backend):
    def step(parents, lengths):
        tree = Tree.from_parent(parents)
        return tree.dense_mask(), tree.positions(lengths), tree.depth

    parents = random_parents(2, 9).to(backend.device)
    lengths = as_counts(4, 5, device=backend.device)
    for a, b in zip(
        torch.compile(step, fullgraph=True)(parents, lengths), step(parents, lengths), strict=True
    ):
        assert torch.equal(a, b)


def test_exports_with_a_tree_as_input(backend):
    class Mask(torch.nn.Module):
        def forward(self, tree, lengths):
            return tree.dense_mask(), tree.positions(lengths)

    tree = Tree.from_parent(random_parents(2, 9).to(backend.device))
    arguments = (tree, as_counts(4, 5, device=backend.device))
    exported = torch.export.export(Mask(), arguments)
    for a, b in zip(exported.module()(*arguments), Mask()(*arguments), strict=True):
        assert torch.equal(a, b)


def test_exports_building_a_tree(backend):
    class Build(torch.nn.Module):
        def forward(self, parents):
            return Tree.from_parent(parents).ancestors

    parents = random_parents(2, 70).to(backend.device)
    exported = torch.export.export(Build(), (parents,))
    assert torch.equal(exported.module()(parents), Tree.from_parent(parents).ancestors)
