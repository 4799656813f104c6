"""The drafters by themselves: what they propose and what they learn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.decode.cases import exact_model, ragged_prompts, tiny_model
from tranche.decode import (
    BitSwitchDrafter,
    LayerSkipDrafter,
    NgramDrafter,
    RecyclingDrafter,
    generate,
    tree_of_chains,
)
from tranche.decode.recycling import template


def paths(tree, tokens, row=0):
    """Every root-to-node path of tokens, as a set."""
    found = set()
    parents = tree.parent[row].tolist()
    for node in range(1, int(tree.n_nodes[row])):
        path = []
        while node > 0:
            path.append(int(tokens[row, node]))
            node = parents[node]
        found.add(tuple(path[::-1]))
    return found


def prefixes(chains):
    return {tuple(chain[: i + 1]) for chain in chains for i in range(len(chain))}


def test_a_tree_of_chains_shares_what_begins_alike():
    chains = [[[1, 2, 3], [1, 2, 4], [5, 9, 9], [1, 7, 9]], [[6, 6, 6], [6, 6, 6], [6, 6, 6], [0, 0, 0]]]
    lengths = torch.tensor([[3, 3, 1, 2], [2, 3, 0, 0]])
    tree, tokens = tree_of_chains(torch.tensor(chains), lengths, 20)
    assert tree.n_nodes.tolist() == [7, 4]
    assert paths(tree, tokens, 0) == prefixes([[1, 2, 3], [1, 2, 4], [5], [1, 7]])
    assert paths(tree, tokens, 1) == prefixes([[6, 6, 6]])
    small, few = tree_of_chains(torch.tensor(chains), lengths, 3)
    assert paths(small, few, 0) == prefixes([[1, 2]])


@pytest.mark.parametrize("seed", range(5))
def test_random_chains(seed):
    generator = torch.Generator().manual_seed(seed)
    chains = torch.randint(3, (4, 6, 5), generator=generator)
    lengths = torch.randint(6, (4, 6), generator=generator)
    tree, tokens = tree_of_chains(chains, lengths, 31)
    for row in range(4):
        want = prefixes([chains[row, c, : int(lengths[row, c])].tolist() for c in range(6)])
        assert paths(tree, tokens, row) == want
        assert int(tree.n_nodes[row]) == len(want) + 1


def context_of(texts: list[list[int]], tree_size: int = 20) -> SimpleNamespace:
    tokens = torch.zeros(len(texts), 40, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    seqlens = torch.tensor([len(text) - 1 for text in texts], dtype=torch.int32)
    root = tokens.gather(1, seqlens.long()[:, None])[:, 0]
    return SimpleNamespace(tokens=tokens, seqlens=seqlens, tree_size=tree_size, root=root)


def test_ngrams_prefer_long_matches_and_fall_back_to_shorter():
    long = [1, 2, 3, 7, 7, 9, 3, 8, 1, 2, 3]
    context = context_of([long, [4, 5, 6], [5, 4, 5]])
    tree, tokens = NgramDrafter(n=3).propose(context)
    assert tokens[0, 1:5].tolist() == [7, 7, 9, 3]  # after "1 2 3", before what followed the lone 3
    assert (8,) in paths(tree, tokens, 0)
    assert tree.n_nodes[1] == 1  # nothing to go by
    assert paths(tree, tokens, 2) == prefixes([[4, 5]])


def test_of_equal_matches_the_latest_comes_first():
    tree, tokens = NgramDrafter(n=2).propose(context_of([[1, 2, 3, 1, 2, 4, 1, 2]]))
    assert tokens[0, 1] == 4
    assert (3,) in paths(tree, tokens)


def test_the_template_holds_its_smaller_versions():
    large = template(80, 8)
    assert len(large[0]) == 80 and max(large[2]) >= 4
    assert [part[:20] for part in large] == list(template(20, 8))
    assert all(parent < node for node, parent in enumerate(large[0]))


def test_recycling_keeps_the_last_of_equal_tokens():
    model = tiny_model()
    drafter = RecyclingDrafter(width=2)
    drafter.prepare(model, 2, 64, torch.device("cpu"))
    logits = torch.zeros(2, 3, 64)
    tokens = torch.tensor([[5, 6, 5], [6, 5, 9]])
    for row in range(2):
        for node in range(3):
            logits[row, node, 10 * row + node] = 2.0
            logits[row, node, 10 * row + node + 30] = 1.0
    tree = SimpleNamespace(n_nodes=torch.tensor([3, 2]))
    drafter.observe(SimpleNamespace(logits=logits, node_tokens=tokens, tree=tree), None)
    assert drafter._adjacency[5].tolist() == [11, 41]  # sequence 1, node 1
    assert drafter._adjacency[6].tolist() == [10, 40]
    assert drafter._adjacency[9].tolist() == [0, 0]  # past the tree's nodes
    context = context_of([[1, 5]], tree_size=4)
    tree, tokens = drafter.propose(context)
    assert {(11,), (41,)} <= paths(tree, tokens)


def test_recycling_remembers_between_calls():
    model = exact_model()
    tokens, mask = ragged_prompts(2)
    drafter = RecyclingDrafter()
    settings = {"attention_mask": mask, "max_new_tokens": 60, "exact": True}
    first = generate(model, drafter, tokens, **settings)
    second = generate(model, drafter, tokens, **settings)
    assert torch.equal(first.sequences, second.sequences)
    assert second.statistics.tokens_per_pass > 1.2


def test_fewer_bits_and_layers_draft_worse_than_all():
    model = exact_model()
    tokens, mask = ragged_prompts(2)

    def per_pass(drafter):
        made = generate(
            model, drafter, tokens, attention_mask=mask, max_new_tokens=60, exact=True, tree_size=9
        )
        return made.statistics.tokens_per_pass

    assert per_pass(BitSwitchDrafter(8)) > per_pass(BitSwitchDrafter(3))
    assert per_pass(LayerSkipDrafter(())) > per_pass(LayerSkipDrafter((1,)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NgramDrafter(0), "expected n >= 1, got 0"),
        (lambda: RecyclingDrafter(0), "expected width >= 1, got 0"),
        (lambda: BitSwitchDrafter(1), r"expected bits in \[2, 8\], got 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
