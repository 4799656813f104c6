"""verify_greedy, verify_sample and verify_typical: walks down trees."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tree.cases import random_parents
from tests.tree.walks import Walk, assert_accepted, make_walk, repeated, tree_of
from tranche.tree import Accepted, Tree, reference, sample, verify_greedy, verify_sample, verify_typical

OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 4, "top_p": 0.9},
    {"temperature": 0.0},
]
KINDS = ["random", "chain", "star", "binary", "deep"]


def greedy_target(walk: Walk) -> torch.Tensor:
    return walk.logits.nan_to_num(nan=-torch.inf).argmax(dim=-1)


# ---- verify_greedy ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 31, 33, 64, 65, 364, 1024])
def test_greedy_is_the_references(backend, kind, nodes):
    for vocab in (1, 2, 5):
        walk = make_walk(nodes, nodes=nodes, vocab=vocab, kind=kind, counts=(nodes, nodes // 2, 0))
        target = greedy_target(walk)
        want = reference.verify_greedy(walk.tokens, walk.tree, target)
        on = walk.to(backend.device)
        tree = on.tree.to(backend.device)
        assert_accepted(verify_greedy(on.tokens, tree, target.to(backend.device)), want)


def test_greedy_accepts_a_whole_chain(backend):
    tokens = torch.arange(70, device=backend.device)[None]
    target = tokens + 1
    accepted = verify_greedy(tokens, Tree.chain(70, device=backend.device), target)
    assert accepted.path.tolist() == [list(range(70))]
    assert accepted.length.tolist() == [69]
    assert accepted.next_token.tolist() == [70]


@given(st.integers(0, 3), st.integers(1, 140), st.integers(1, 4), st.integers(0, 2**31))
def test_greedy_property(batch, nodes, vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, nodes + 1, (batch,), generator=generator).tolist()
    tree = tree_of(random_parents(batch, nodes, generator=generator), tuple(counts))
    tokens, target = torch.randint(0, vocab, (2, batch, nodes), generator=generator)
    assert_accepted(verify_greedy(tokens, tree, target), reference.verify_greedy(tokens, tree, target))


# ---- verify_sample ----


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_walks_are_the_references(backend, kind, options):
    counts = (12, 7, 0, 1)
    walk = make_walk(5, batch=4, vocab=4, kind=kind, counts=counts)
    position = torch.tensor([3, 500, 0, 2**33])
    for seed in range(backend.pick(20, 2)):
        want = walk.reference(**options, seed=seed, position=position)
        got = walk.to(backend.device).verify(**options, seed=seed, position=position.to(backend.device))
        assert_accepted(got, want)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_verify_sample_equals_sample_token_for_token(backend, options):
    """The walk's tokens, and next_token, are what sample draws from the visited rows one after the other."""
    walk = make_walk(8, batch=5, nodes=40, vocab=5, kind="deep").to(backend.device)
    for seed in range(backend.pick(20, 1)):
        position = torch.arange(5, device=backend.device) * 100
        accepted = walk.verify(**options, seed=seed, position=position)
        for b in range(5):
            length = int(accepted.length[b])
            path = accepted.path[b, : length + 1].long()
            expected = [*walk.tokens[b, path[1:]].tolist(), int(accepted.next_token[b])]
            drawn = sample(
                walk.logits[b, path],
                **options,
                seed=torch.full((length + 1,), seed + b, device=backend.device),
                position=100 * b + torch.arange(length + 1, device=backend.device),
            )
            assert drawn.tolist() == expected


def test_the_text_does_not_depend_on_the_draft(backend):
    """Markov logits: whatever trees are drafted, the text is that of sampling token by token."""
    vocab, steps = 5, backend.pick(60, 8)
    generator = torch.Generator().manual_seed(3)
    table = (2 * torch.randn(vocab, vocab, generator=generator)).to(backend.device)
    options = {
        "temperature": 0.8,
        "top_k": 4,
        "top_p": 0.95,
        "seed": torch.tensor([9], device=backend.device),
    }

    def at(position: int) -> torch.Tensor:
        return torch.tensor([position], device=backend.device)

    plain = [0]
    while len(plain) < steps + 12:
        plain.append(int(sample(table[plain[-1]][None], **options, position=at(len(plain)))))
    for kind in ("random", "star", "chain", "binary"):
        text = [0]
        while len(text) < steps:
            parents = random_parents(1, 12, kind, generator)
            tokens = torch.randint(0, vocab, (1, 12), generator=generator)
            tokens[0, 0] = text[-1]
            tokens = tokens.to(backend.device)
            tree = tree_of(parents).to(backend.device)
            accepted = verify_sample(tokens, tree, table[tokens], **options, position=at(len(text)))
            path = accepted.path[0, 1 : 1 + int(accepted.length)].long()
            text += [*tokens[0, path].tolist(), int(accepted.next_token)]
        assert text == plain[: len(text)]


@pytest.mark.parametrize("nodes", [33, 40, 65, 100])
def test_trees_above_32_and_64_nodes_and_no_multiples_of_32(backend, nodes):
    for kind in backend.pick(("chain", "deep"), ("deep",)):
        walk = make_walk(nodes, batch=2, nodes=nodes, vocab=backend.pick(2, 1), kind=kind)
        want = walk.reference(temperature=1.0, seed=4, position=0)
        assert_accepted(walk.to(backend.device).verify(temperature=1.0, seed=4, position=0), want)
        if backend.name == "sim":
            assert walk.tree.depth.max() > 5


def test_a_walk_down_a_long_chain(backend):
    nodes = backend.pick(1024, 70)
    tokens = torch.zeros(1, nodes, dtype=torch.int64, device=backend.device)
    logits = torch.zeros(1, nodes, 1, device=backend.device)
    tree = Tree.chain(nodes, device=backend.device)
    accepted = verify_sample(tokens, tree, logits, temperature=1.0, seed=0, position=0)
    assert accepted.path.tolist() == [list(range(nodes))]
    assert accepted.length.tolist() == [nodes - 1]
    assert accepted.next_token.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend, dtype):
    walk = make_walk(2, vocab=5, dtype=dtype, counts=(12, 5, 9))
    for options in OPTIONS:
        want = walk.reference(**options, seed=1, position=0)
        assert_accepted(walk.to(backend.device).verify(**options, seed=1, position=0), want)


def test_siblings_with_equal_tokens_the_first_wins(backend):
    parents = torch.tensor([[-1, 0, 0, 0, 1, 2]], dtype=torch.int32)
    tokens = torch.tensor([[9, 3, 3, 4, 5, 6]], device=backend.device)
    tree = tree_of(parents).to(backend.device)
    target = torch.tensor([[3, 6, 6, 0, 0, 0]], device=backend.device)
    accepted = verify_greedy(tokens, tree, target)
    # node 2 would go on to node 5; the first sibling with token 3 has only a child of token 5
    assert accepted.path.tolist() == [[0, 1, -1, -1, -1, -1]]
    assert accepted.next_token.tolist() == [6]
    logits = torch.nn.functional.one_hot(target, 10) * 100.0
    for sampled in (
        verify_sample(tokens, tree, logits, temperature=1.0, seed=0, position=0),
        verify_sample(tokens, tree, logits, temperature=0.0, seed=0, position=0),
    ):
        assert_accepted(sampled, accepted)


def test_nodes_past_n_nodes_are_never_visited(backend):
    """Their logits are NaN, their tokens match, and their parents are no parents."""
    parents = torch.tensor([[-1, 0, 0, 1]], dtype=torch.int32)
    tree = tree_of(parents, (2,))
    tree.parent[0, 2:] = torch.tensor([77, -9], dtype=torch.int32)
    tree = tree.to(backend.device)
    tokens = torch.full((1, 4), 1, device=backend.device)
    tokens[0, 1] = 0
    logits = torch.full((1, 4, 2), torch.nan, device=backend.device)
    logits[0, 0] = torch.tensor([-torch.inf, 0.0])
    target = torch.ones(1, 4, dtype=torch.int64, device=backend.device)
    for accepted in (
        verify_sample(tokens, tree, logits, temperature=1.0, seed=0, position=0),
        verify_greedy(tokens, tree, target),
        verify_typical(tokens, tree, logits, epsilon=0.0, delta=0.0),
    ):
        assert accepted.path.tolist() == [[0, -1, -1, -1]]
        assert accepted.length.tolist() == [0]
        assert accepted.next_token.tolist() == [1]


def test_rows_off_the_walk_do_not_matter(backend):
    walk = make_walk(3, nodes=20, vocab=5).to(backend.device)
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 2, "position": 0}
    accepted = walk.verify(**options)
    visited = torch.zeros(3, 21, dtype=torch.bool, device=backend.device)
    visited.scatter_(1, torch.where(accepted.path < 0, 20, accepted.path).long(), True)
    poisoned = torch.where(visited[:, :20, None], walk.logits, torch.nan)
    assert_accepted(walk.with_logits(poisoned).verify(**options), accepted)


def test_rows_do_not_depend_on_their_neighbours(backend):
    walk = make_walk(4, batch=6, nodes=20, vocab=4).to(backend.device)
    seeds = torch.arange(6, device=backend.device)
    together = walk.verify(temperature=1.0, top_p=0.9, seed=seeds, position=0)
    for b in backend.pick(range(6), (0, 5)):
        row = slice(b, b + 1)
        tree = Tree(
            *(t[row] for t in (walk.tree.parent, walk.tree.n_nodes, walk.tree.depth, walk.tree.ancestors))
        )
        alone = verify_sample(
            walk.tokens[row], tree, walk.logits[row], temperature=1.0, top_p=0.9, seed=seeds[row], position=0
        )
        assert_accepted(alone, Accepted(together.path[row], together.length[row], together.next_token[row]))


def test_rows_with_equal_prompts_and_different_seeds_differ(backend):
    one = make_walk(1, batch=1, nodes=6, vocab=30)
    batch = backend.pick(40, 12)
    walk = Walk(one.tokens.repeat(batch, 1), repeated(one.tree, batch), one.logits.expand(batch, 6, 30)).to(
        backend.device
    )
    assert walk.verify(temperature=1.0, seed=3, position=0).next_token.unique().numel() >= 3


def test_strides_of_logits(backend):
    walk = make_walk(7, vocab=9).to(backend.device)
    wide = torch.full((3, 14, 11), torch.nan, device=backend.device)
    wide[:, 1:13, 2:] = walk.logits
    view = walk.with_logits(wide[:, 1:13, 2:])
    options = {"temperature": 0.9, "top_k": 5, "seed": 1, "position": 2}
    assert_accepted(view.verify(**options), walk.verify(**options))


# ---- verify_typical ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_typical_is_the_references(backend, kind, dtype):
    for seed, (epsilon, delta, temperature) in enumerate(
        [(0.3, 0.09, 0.7), (0.05, 0.5, 1.0), (0.2, 2.0, 1.5)]
    ):
        walk = make_walk(seed, batch=4, nodes=30, vocab=6, kind=kind, counts=(30, 17, 0, 1), dtype=dtype)
        options = {"epsilon": epsilon, "delta": delta, "temperature": temperature}
        want = reference.verify_typical(walk.tokens, walk.tree, walk.logits, **options)
        on = walk.to(backend.device)
        assert_accepted(verify_typical(on.tokens, on.tree, on.logits, **options), want)


def test_typical_thresholds(backend):
    """One node of two children; p = 1/2, 1/4, 1/4, so H = 1.5 ln 2 and exp(-H) = 2^-1.5."""
    tree = tree_of(torch.tensor([[-1, 0, 0]], dtype=torch.int32)).to(backend.device)
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25], device=backend.device)).expand(1, 3, 3).contiguous()
    tokens = torch.tensor([[0, 1, 2]], device=backend.device)

    def accepted(**options) -> list[int]:
        return verify_typical(tokens, tree, logits, **options).path[0].tolist()

    assert accepted(epsilon=0.24, delta=9.0) == [0, 1, -1]  # both; equally likely: the first
    assert accepted(epsilon=0.26, delta=9.0) == [0, -1, -1]
    assert accepted(epsilon=0.9, delta=0.24 / 2**-1.5) == [0, 1, -1]
    assert accepted(epsilon=0.9, delta=0.26 / 2**-1.5) == [0, -1, -1]
    tokens[0, 2] = 0
    assert accepted(epsilon=0.1, delta=9.0) == [0, 2, -1]  # the likelier of equally long paths
    tokens[0, 1:] = torch.tensor([-1, 3])
    assert accepted(epsilon=0.0, delta=0.0) == [0, -1, -1]


def test_typical_with_large_vocabulary(backend):
    vocab = backend.pick(32000, 700)
    walk = make_walk(3, batch=2, nodes=5, vocab=vocab, spread=3.0)
    best = walk.logits.topk(3).indices
    for i in range(1, 5):
        walk.tokens[:, i] = best[torch.arange(2), walk.tree.parent[:, i].long(), i % 3]
    options = {"epsilon": 0.02, "delta": 0.3}
    want = reference.verify_typical(walk.tokens, walk.tree, walk.logits, **options)
    on = walk.to(backend.device)
    assert_accepted(verify_typical(on.tokens, on.tree, on.logits, **options), want)


def test_typical_without_numbers(backend):
    nan, inf = torch.nan, torch.inf
    tree = tree_of(torch.tensor([[-1, 0]] * 3, dtype=torch.int32)).to(backend.device)
    tokens = torch.ones(3, 2, dtype=torch.int64, device=backend.device)
    rows = torch.tensor([[nan, nan], [-inf, -inf], [nan, inf]], device=backend.device)
    logits = rows[:, None].expand(3, 2, 2).contiguous()
    accepted = verify_typical(tokens, tree, logits, epsilon=0.0, delta=0.0)
    assert accepted.length.tolist() == [0, 0, 1]
    assert accepted.next_token.tolist() == [0, 0, 1]


# ---- all three ----


def verifiers(walk: Walk):
    target = torch.zeros_like(walk.tokens)
    return {
        "tree_verify_greedy": lambda: verify_greedy(walk.tokens, walk.tree, target),
        "tree_verify_sample": lambda: walk.verify(temperature=1.0, seed=0, position=0),
        "tree_verify_typical": lambda: verify_typical(
            walk.tokens, walk.tree, walk.logits, epsilon=0.3, delta=0.1
        ),
    }


@pytest.mark.parametrize(("batch", "nodes"), [(0, 4), (2, 0), (0, 0)])
def test_empty(backend, batch, nodes):
    walk = make_walk(0, batch=batch, nodes=nodes).to(backend.device)
    for verify in verifiers(walk).values():
        accepted = verify()
        assert accepted.path.shape == (batch, nodes)
        assert accepted.length.tolist() == [0] * batch
        assert accepted.next_token.tolist() == [-1] * batch


def test_trees_without_nodes_beside_others(backend):
    walk = make_walk(0, counts=(0, 12, 0)).to(backend.device)
    for verify in verifiers(walk).values():
        accepted = verify()
        assert (accepted.path[[0, 2]] == -1).all()
        assert accepted.path[1, 0] == 0
        assert accepted.length[[0, 2]].tolist() == [0, 0]
        assert accepted.next_token[[0, 2]].tolist() == [-1, -1]


def test_a_parent_that_is_no_parent(backend, monkeypatch):
    walk = make_walk(0, batch=1, nodes=4, vocab=1, kind="chain").to(backend.device)
    walk.tree.parent[0, 3] = 3
    walk.logits[:] = 0
    for verify in verifiers(walk).values():
        if backend.name != "cpu":
            assert verify().path.tolist() == [[0, 1, 2, -1]]  # node 3 hangs under the root, after node 1
            monkeypatch.setenv("TRANCHE_CHECK", "1")
        with pytest.raises(IndexError, match=r"parent\[0, 3\] in \[0, 3\), got 3"):
            verify()
        monkeypatch.delenv("TRANCHE_CHECK", raising=False)


def test_a_count_past_the_row(backend):
    for count, clamped in ((9, 3), (-2, 0)):
        walk = make_walk(0, batch=1, nodes=3, vocab=1, kind="chain", poison=False).to(backend.device)
        walk.tree.n_nodes[0] = count
        for name, verify in verifiers(walk).items():
            if backend.name == "cpu":
                with pytest.raises(
                    IndexError, match=rf"{name}: expected n_nodes\[0\] in \[0, 3\], got {count}"
                ):
                    verify()
            else:
                assert (verify().path >= 0).sum() == clamped


def test_bad_input_by_name(backend):
    walk = make_walk(0, batch=2, nodes=4, vocab=5).to(backend.device)
    tokens, tree, logits = walk.tokens, walk.tree, walk.logits
    short = tree_of(random_parents(2, 3)).to(backend.device)
    target = torch.zeros_like(tokens)
    sampling = {"temperature": 1.0, "seed": 0, "position": 0}
    typical = {"epsilon": 0.3, "delta": 0.1}
    wrong = [
        (
            lambda: verify_greedy(tokens.int(), tree, target),
            "tree_verify_greedy: expected tokens of dtype torch.int64, got torch.int32",
        ),
        (lambda: verify_greedy(tokens, tree, target.int()), "target of dtype torch.int64, got torch.int32"),
        (lambda: verify_greedy(tokens, tree, target[0]), r"target of shape \[B, N\], got \[4\]"),
        (lambda: verify_greedy(tokens, short, target), r"parent of shape \[B, N\] = \[2, 4\], got \[2, 3\]"),
        (
            lambda: verify_greedy(tokens[:1], tree, target),
            r"tokens of shape \[B, N\] = \[2, 4\], got \[1, 4\]",
        ),
        (
            lambda: verify_sample(tokens, tree, logits[0], **sampling),
            r"logits of shape \[B, N, V\], got \[4, 5\]",
        ),
        (
            lambda: verify_sample(tokens, tree, logits.double(), **sampling),
            "logits of dtype torch.float32 or torch.float16 or torch.bfloat16",
        ),
        (
            lambda: verify_sample(tokens[:, :3], tree, logits, **sampling),
            r"tokens of shape \[B, N\] = \[2, 4\]",
        ),
        (
            lambda: verify_sample(tokens, tree, logits[..., ::2], **sampling),
            r"logits\.stride\(-1\) == 1, got 2",
        ),
        (
            lambda: verify_typical(tokens, tree, logits.double(), **typical),
            "logits of dtype torch.float32 or torch.float16 or torch.bfloat16",
        ),
        (
            lambda: verify_typical(tokens, tree, logits, **typical, temperature=0.0),
            "a finite temperature > 0, got 0",
        ),
        (lambda: verify_typical(tokens, tree, logits, epsilon=-0.1, delta=0.1), r"epsilon >= 0, got -0\.1"),
        (lambda: verify_typical(tokens, tree, logits, epsilon=0.1, delta=math.nan), "delta >= 0, got nan"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    many = torch.zeros(1, 1025, dtype=torch.int64, device=backend.device)
    with pytest.raises(ValueError, match="at most 1024 nodes"):
        backend.ops().tree_verify_greedy(many, many.int(), many[0, :1].int(), many)


def test_opcheck(backend):
    walk = make_walk(0, batch=2, nodes=5, vocab=7).to(backend.device)
    arguments = (walk.tokens, walk.tree.parent, walk.tree.n_nodes)
    numbers = (
        torch.ones(2),
        torch.zeros(2, dtype=torch.int32),
        torch.ones(2),
        torch.tensor([1, 2]),
        torch.tensor([5, 6]),
    )
    on_device = tuple(t.to(backend.device) for t in numbers)
    ops = backend.ops()
    torch.library.opcheck(ops.tree_verify_greedy.default, (*arguments, torch.zeros_like(walk.tokens)))
    torch.library.opcheck(ops.tree_verify_sample.default, (*arguments, walk.logits, *on_device))
    torch.library.opcheck(ops.tree_verify_typical.default, (*arguments, walk.logits, 0.3, 0.1, 1.0))


def test_compiles_in_one_graph(backend):
    def step(tokens, parents, logits, position):
        tree = Tree.from_parent(parents)
        greedy = verify_greedy(tokens, tree, logits.argmax(-1))
        sampled = verify_sample(tokens, tree, logits, temperature=0.7, top_p=0.9, seed=3, position=position)
        typical = verify_typical(tokens, tree, logits, epsilon=0.3, delta=0.1)
        return greedy, sampled, typical

    walk = make_walk(0, batch=2, nodes=9, vocab=4).to(backend.device)
    arguments = (walk.tokens, walk.tree.parent, walk.logits, torch.tensor([4, 7], device=backend.device))
    for a, b in zip(torch.compile(step, fullgraph=True)(*arguments), step(*arguments), strict=True):
        assert isinstance(a, Accepted)
        assert_accepted(a, b)


def test_exports_with_accepted_as_output(backend):
    class Verify(torch.nn.Module):
        def forward(self, tokens, tree, target):
            return verify_greedy(tokens, tree, target)

    walk = make_walk(0, batch=2, nodes=9, vocab=2).to(backend.device)
    arguments = (walk.tokens, walk.tree, torch.zeros_like(walk.tokens))
    exported = torch.export.export(Verify(), arguments)
    assert_accepted(exported.module()(*arguments), Verify()(*arguments))
