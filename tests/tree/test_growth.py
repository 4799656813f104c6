"""expand_beam, select_tree and the candidate pool against their references."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tree.cases import assert_same_bits
from tranche.tree import CandidatePool, Tree, chosen_candidates, expand_beam, reference, select_tree

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def flatten(level):
    return (level.scores, level.parent_beam, level.tokens, level.candidates.scores, level.candidates.tokens)


def assert_same_level(got, want):
    for a, b in zip(flatten(got), flatten(want), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b), (a, b)


def draw(batch, beams, vocab, dtype=torch.float32, *, steps=None, seed=0):
    """Log-probabilities and beam scores; with `steps`, of so few values that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, beams, vocab, generator=generator)
    logprobs = torch.log_softmax(logits, dim=2) if steps is None else torch.round(logits * steps)
    scores = -torch.rand(batch, beams, generator=generator) if steps is None else torch.zeros(batch, beams)
    return logprobs.to(dtype), scores


# ---- expand_beam ----------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [1, 7, 64, 129, 1000, 8192, 8193, 33000])
def test_expand_beam_vocabularies(backend, vocab, dtype):
    batch, beams = backend.pick((3, 10), (1, 2) if vocab > 1000 else (2, 3))
    logprobs, scores = (t.to(backend.device) for t in draw(batch, beams, vocab, dtype))
    for k in {1, min(10, vocab)}:
        assert_same_level(expand_beam(logprobs, scores, k), reference.expand_beam(logprobs, scores, k))


@pytest.mark.parametrize(("beams", "k"), [(1, 1), (1, 128), (128, 1), (128, 128), (33, 40), (2, 65)])
def test_expand_beam_widths(backend, beams, k):
    vocab = backend.pick(9000, 140)
    logprobs, scores = (t.to(backend.device) for t in draw(1, beams, vocab))
    assert_same_level(expand_beam(logprobs, scores, k), reference.expand_beam(logprobs, scores, k))


def test_expand_beam_merges_many_wide_tiles(backend):
    # more entries than a warp stages in shared memory, and more than 32 tiles
    vocab, k = backend.pick((300_000, 128), (17_000, 128))
    logprobs, scores = (t.to(backend.device) for t in draw(1, 2, vocab))
    assert_same_level(expand_beam(logprobs, scores, k), reference.expand_beam(logprobs, scores, k))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps", [0, 0.5, 3])
def test_ties_go_to_the_lower_token_then_the_lower_position(backend, steps, dtype):
    logprobs, scores = (
        t.to(backend.device) for t in draw(2, 4, backend.pick(20_000, 9000), dtype, steps=steps)
    )
    got = expand_beam(logprobs, scores, 9)
    assert_same_level(got, reference.expand_beam(logprobs, scores, 9))
    if steps == 0:
        assert got.candidates.tokens.tolist() == [[list(range(9))] * 4] * 2
        assert got.parent_beam.tolist() == [[0] * 9] * 2


def test_zeros_of_either_sign_tie(backend):
    logprobs = torch.tensor([[[-0.0, 0.0, -0.0, 0.0]]], device=backend.device)
    for beam in (0.0, -0.0):
        level = expand_beam(logprobs, torch.tensor([[beam]], device=backend.device), 4)
        assert level.tokens.tolist() == [[0, 1, 2, 3]]


def test_nan_is_ranked_last(backend):
    inf, nan = torch.inf, torch.nan
    rows = [[nan, -3.0, nan, -inf, -1.0], [nan] * 5, [-inf, nan, -inf, nan, -inf], [inf, nan, 0.0, -inf, nan]]
    logprobs = torch.tensor([rows], device=backend.device)
    scores = torch.zeros(1, 4, device=backend.device)
    level = expand_beam(logprobs, scores, 5)
    assert_same_level(level, reference.expand_beam(logprobs, scores, 5))
    assert level.candidates.tokens[0].tolist() == [
        [4, 1, 0, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [0, 2, 1, 3, 4],
    ]
    assert level.tokens[0].tolist() == [0, 2, 4, 1, 0]
    # a beam without a score offers nothing real
    level = expand_beam(
        torch.zeros(1, 2, 5, device=backend.device), torch.tensor([[nan, -9.0]], device=backend.device), 5
    )
    assert level.parent_beam.tolist() == [[1] * 5]


def test_nan_behind_a_vector_of_numbers(backend):
    logprobs, scores = draw(1, 1, 500)
    logprobs[0, 0, 100::3] = torch.nan
    logprobs, scores = logprobs.to(backend.device), scores.to(backend.device)
    assert_same_level(expand_beam(logprobs, scores, 20), reference.expand_beam(logprobs, scores, 20))


@pytest.mark.parametrize("place", [0, 127, 128, 255, 8191, 8192, -1])
def test_the_best_is_found_wherever_it_stands(backend, place):
    vocab = 8200
    logprobs = torch.full((1, 1, vocab), -5.0, device=backend.device)
    logprobs[0, 0, place] = -1.0
    level = expand_beam(logprobs, torch.zeros(1, 1, device=backend.device), 2)
    assert level.tokens[0, 0] == place % vocab


def test_all_of_the_best_in_one_thread_or_block(backend):
    logprobs = torch.full((1, 1, 20_000), -9.0, device=backend.device)
    logprobs[0, 0, 8192 + 512 : 8192 + 512 + 40] = -torch.arange(40, device=backend.device).float() / 40
    scores = torch.zeros(1, 1, device=backend.device)
    assert_same_level(expand_beam(logprobs, scores, 32), reference.expand_beam(logprobs, scores, 32))


def test_strided_logprobs_give_the_same_bits(backend):
    logprobs, scores = (t.to(backend.device) for t in draw(2, 3, 1001, torch.bfloat16))
    want = expand_beam(logprobs, scores, 10)
    wide = torch.full((3, 2, 1010), torch.nan, dtype=torch.bfloat16, device=backend.device)
    view = wide.transpose(0, 1)[:, :, 5:-4]
    view.copy_(logprobs)
    for a, b in zip(flatten(expand_beam(view, scores, 10)), flatten(want), strict=True):
        assert torch.equal(a, b)


def test_expand_beam_rows_do_not_depend_on_their_batch(backend):
    logprobs, scores = (t.to(backend.device) for t in draw(4, 3, 9000, torch.bfloat16))
    together = flatten(expand_beam(logprobs, scores, 10))
    for b in range(4):
        alone = flatten(expand_beam(logprobs[b : b + 1], scores[b : b + 1], 10))
        for a, t in zip(alone, together, strict=True):
            assert torch.equal(a, t[b : b + 1])


def test_expand_beam_in_double():
    logprobs, scores = draw(2, 3, 40_000)
    logprobs, scores = logprobs.double() + 1e-12 * torch.randn(2, 3, 40_000), scores.double()
    assert_same_level(expand_beam(logprobs, scores, 12), reference.expand_beam(logprobs, scores, 12))


@pytest.mark.parametrize(("batch", "k"), [(0, 3), (2, 0)])
def test_expand_beam_empty(backend, batch, k):
    logprobs, scores = (t.to(backend.device) for t in draw(batch, 2, 9))
    level = expand_beam(logprobs, scores, k)
    assert level.scores.shape == (batch, k)
    assert level.candidates.tokens.shape == (batch, 2, k)


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 300),
    st.integers(1, 12),
    st.sampled_from([0, 0.4, 2, None]),
)
def test_expand_beam_property(batch, beams, vocab, k, steps):
    logprobs, scores = draw(batch, beams, vocab, steps=steps, seed=vocab)
    k = min(k, vocab)
    assert_same_level(expand_beam(logprobs, scores, k), reference.expand_beam(logprobs, scores, k))


def test_expand_beam_bad_input_by_name(backend):
    logprobs, scores = (t.to(backend.device) for t in draw(2, 3, 9))
    wrong = [
        (logprobs[0], scores, 2, r"logprobs of shape \[B, K, V\], got \[3, 9\]"),
        (
            logprobs.int(),
            scores,
            2,
            "logprobs of dtype torch.float32 or torch.float16 or torch.bfloat16.*got torch.int32",
        ),
        (logprobs.mT.contiguous().mT, scores, 2, r"expected logprobs\.stride\(-1\) == 1"),
        (logprobs, scores.half(), 2, "beam_scores of dtype torch.float32, got torch.float16"),
        (logprobs, scores[:, :2], 2, r"beam_scores of shape \[B, K\] = \[2, 3\], got \[2, 2\]"),
        (logprobs, scores, 10, r"expected k <= logprobs\.size\(2\) \(9\), got 10"),
        (logprobs, scores, -1, r"expected k in \[0, 128\], got -1"),
        (logprobs[:, :0], scores[:, :0], 2, r"expected logprobs\.size\(1\) in \[1, 128\], got 0"),
    ]
    for *arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            expand_beam(*arguments)


# ---- select_tree ----------------------------------------


def random_pool(batch, candidates, *, monotone=True, steps=None, nan=0.0, seed=0):
    """Scores, parents, tokens and root tokens of a random pool."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(candidates)
    parents = (torch.rand(batch, candidates, generator=generator) * (place + 1)).to(torch.int32) - 1
    scores = torch.randn(batch, candidates, generator=generator)
    if steps is not None:
        scores = torch.round(scores * steps)
    if monotone:
        scores = -scores.abs()
        for c in range(candidates):
            up = parents[:, c].long()
            above = scores.gather(1, up.clamp(min=0)[:, None])[:, 0]
            scores[:, c] += torch.where(up >= 0, above, torch.zeros(()))
    scores[torch.rand(batch, candidates, generator=generator) < nan] = torch.nan
    tokens = torch.randint(0, 32000, (batch, candidates), generator=generator)
    return scores, parents, tokens, torch.randint(0, 32000, (batch,), generator=generator)


def assert_same_tree(got, want):
    for name in ("parent", "n_nodes", "depth", "ancestors"):
        a, b = getattr(got[0], name), getattr(want[0], name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def on(device, tensors):
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("nodes", [1, 2, 32, 33, 60, 64, 65, 257])
@pytest.mark.parametrize("candidates", [0, 1, 31, 510])
def test_select_tree_sizes(backend, candidates, nodes):
    pool = on(backend.device, random_pool(backend.pick(3, 2), candidates))
    assert_same_tree(select_tree(*pool, nodes), reference.select_tree(*pool, nodes))


@pytest.mark.parametrize(("candidates", "nodes"), [(1024, 1024), (1025, 60), (3000, 1024), (8192, 64)])
def test_select_tree_large_pools(backend, candidates, nodes):
    if backend.name == "sim" and candidates == 8192:
        candidates = 2048
    pool = on(backend.device, random_pool(1, candidates))
    assert_same_tree(select_tree(*pool, nodes), reference.select_tree(*pool, nodes))


def test_a_chain_of_candidates(backend):
    candidates = 200
    parents = torch.arange(-1, candidates - 1, dtype=torch.int32).repeat(2, 1)
    scores = torch.stack([-torch.arange(candidates).float(), torch.arange(candidates).float()])
    pool = on(
        backend.device, (scores, parents, torch.arange(2 * candidates).view(2, -1), torch.tensor([7, 8]))
    )
    tree, tokens, index = select_tree(*pool, 65)
    assert tree.depth.tolist() == [list(range(65))] * 2
    assert index.tolist() == [list(range(-1, 64))] * 2
    assert tokens[1].tolist() == [8, *range(200, 264)]


@pytest.mark.parametrize("nan", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("steps", [None, 0, 1])
def test_defect_ties_nan_and_non_monotone_scores_keep_ancestor_closure(backend, steps, nan):
    for seed in range(backend.pick(20, 2)):
        pool = on(backend.device, random_pool(2, 97, monotone=False, steps=steps, nan=nan, seed=seed))
        tree, tokens, index = got = select_tree(*pool, 40)
        assert_same_tree(got, reference.select_tree(*pool, 40))
        for b in range(2):
            kept = index[b, 1:].tolist()
            assert kept == sorted(set(kept))
            for node, candidate in enumerate(kept, start=1):
                up = int(pool[1][b, candidate])
                assert up == -1 or up in kept
                assert int(tree.parent[b, node]) == (kept.index(up) + 1 if up >= 0 else 0)
                assert tokens[b, node] == pool[2][b, candidate]


def test_too_few_candidates_leave_the_row_ragged(backend):
    pool = on(backend.device, random_pool(2, 5))
    tree, tokens, index = got = select_tree(*pool, 9)
    assert_same_tree(got, reference.select_tree(*pool, 9))
    assert tree.n_nodes.tolist() == [6, 6]
    assert index[:, 6:].eq(-1).all()
    assert tokens[:, 6:].eq(0).all()
    assert tree.ancestors[:, 6:].eq(0).all()


def test_the_selected_tree_is_a_tree(backend):
    pool = on(backend.device, random_pool(3, 300))
    tree, _, _ = select_tree(*pool, 100)
    again = Tree.from_parent(tree.parent, tree.n_nodes)
    assert torch.equal(tree.ancestors, again.ancestors)
    assert torch.equal(tree.depth, again.depth)


def test_select_tree_in_double():
    scores, *rest = random_pool(2, 300)
    pool = (scores.double() + 1e-12 * torch.randn(2, 300).double(), *rest)
    assert_same_tree(select_tree(*pool, 60), reference.select_tree(*pool, 60))


@pytest.mark.parametrize("bad", [(0, 0), (3, 3), (3, 99), (2, -2)])
def test_a_parent_that_is_no_earlier_candidate(backend, bad, monkeypatch):
    candidate, parent = bad
    pool = on(backend.device, random_pool(1, 6))
    pool[1][0, candidate] = parent
    message = rf"expected parents\[0, {candidate}\] in \[-1, {candidate}\), got {parent}\."
    if backend.name != "cpu":
        repaired = [t.clone() for t in pool]
        repaired[1][0, candidate] = -1
        assert_same_tree(select_tree(*pool, 5), select_tree(*repaired, 5))
        monkeypatch.setenv("TRANCHE_CHECK", "1")
    with pytest.raises(IndexError, match=message):
        select_tree(*pool, 5)


def test_select_tree_bad_input_by_name(backend):
    scores, parents, tokens, roots = on(backend.device, random_pool(2, 6))
    wrong = [
        (scores[0], parents, tokens, roots, 4, r"scores of shape \[B, C\], got \[6\]"),
        (scores.half(), parents, tokens, roots, 4, "scores of dtype torch.float32.*got torch.float16"),
        (scores, parents.long(), tokens, roots, 4, "parents of dtype torch.int32, got torch.int64"),
        (scores, parents, tokens[:, :5], roots, 4, r"tokens of shape \[B, C\] = \[2, 6\], got \[2, 5\]"),
        (scores, parents, tokens, roots[:1], 4, r"root_tokens of shape \[B\] = \[2\], got \[1\]"),
        (scores, parents, tokens, roots, 0, r"expected n_nodes >= 1, got 0"),
        (scores, parents, tokens, roots, 1025, "at most 1024 nodes"),
        (scores.T.contiguous().T, parents, tokens, roots, 4, "a contiguous scores"),
    ]
    for *arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            select_tree(*arguments)
    wide = torch.zeros(1, 8193, device=backend.device)
    with pytest.raises(ValueError, match=r"scores\.size\(1\) <= 8192, got 8193"):
        select_tree(wide, wide.int(), wide.long(), roots[:1], 4)


def test_select_tree_of_no_sequences(backend):
    tree, tokens, index = select_tree(*on(backend.device, random_pool(0, 6)), 4)
    assert tree.parent.shape == tokens.shape == index.shape == (0, 4)
    assert tree.ancestors.shape == (0, 4, 1)


# ---- both, through the pool ----------------------------------------


def grow(device, *, batch=2, k=4, depth=3, vocab=50, seed=0):
    """A pool grown with log-probabilities that depend on the whole path; also the table of them by path."""
    generator = torch.Generator().manual_seed(seed)
    table: list[dict[tuple[int, ...], torch.Tensor]] = [{} for _ in range(batch)]

    def logprobs(b, path):
        if path not in table[b]:
            table[b][path] = torch.log_softmax(2 * torch.randn(vocab, generator=generator), dim=0)
        return table[b][path]

    paths = [[()] for _ in range(batch)]
    pool, scores = CandidatePool(), torch.zeros(batch, 1, device=device)
    for _ in range(depth + 1):
        rows = torch.stack([torch.stack([logprobs(b, path) for path in paths[b]]) for b in range(batch)])
        level = expand_beam(rows.to(device), scores, k)
        pool.add(level)
        scores = level.scores
        paths = [
            [
                (*paths[b][up], token)
                for up, token in zip(level.parent_beam[b].tolist(), level.tokens[b].tolist(), strict=True)
            ]
            for b in range(batch)
        ]
    return pool, table


def test_defect_children_of_every_level_hang_under_the_right_beam_node(backend):
    """The score of a candidate is that of the path its parents spell, on the last level too."""
    pool, table = grow(backend.device)
    scores, parents, tokens = pool.scores.cpu(), pool.parents.cpu(), pool.tokens.cpu()
    assert scores.shape == (2, 4 + 3 * 16)
    for b, c in itertools.product(range(2), range(scores.size(1))):
        path, up = [], c
        while up >= 0:
            path.insert(0, int(tokens[b, up]))
            up = int(parents[b, up])
        total = sum(float(table[b][tuple(path[:i])][token]) for i, token in enumerate(path))
        assert abs(total - float(scores[b, c])) < 1e-4


def test_the_published_bookkeeping(backend):
    """chosen_i[c // k] + 1 + k^2 max(0, i - 1) + (k if i > 0), counted from 1 with 0 the root."""
    k, depth = 4, 3
    pool, _ = grow(backend.device, k=k, depth=depth)
    want = torch.zeros(2, k, dtype=torch.long)
    for i in range(depth):
        chosen = torch.arange(k).expand(2, k) if i == 0 else chosen_candidates(pool.levels[i]).cpu().long()
        row = chosen + 1 + k**2 * max(0, i - 1) + (k if i > 0 else 0)
        want = torch.cat([want, row.repeat_interleave(k, dim=1)], dim=1)
    assert torch.equal(pool.parents.cpu().long() + 1, want)
    assert pool.parents.dtype == torch.int32


def test_the_tree_is_the_best_of_the_pool(backend):
    pool, _ = grow(backend.device, k=5, depth=4)
    root_tokens = torch.tensor([1, 2], device=backend.device)
    tree, _, index = pool.select(root_tokens, 24)
    # log-probabilities are negative: the closed set is simply the 23 best
    best = pool.scores.sort(dim=1, descending=True, stable=True).indices[:, :23].sort(dim=1).values
    assert torch.equal(index[:, 1:].long(), best)
    assert torch.equal(tree.parent[:, 0], torch.tensor([-1, -1], dtype=torch.int32, device=backend.device))


def test_a_pool_out_of_order(backend):
    pool = CandidatePool()
    with pytest.raises(ValueError, match="expected at least one level"):
        pool.scores  # noqa: B018
    logprobs, scores = (t.to(backend.device) for t in draw(1, 3, 9))
    with pytest.raises(ValueError, match="expected a level grown from 1 beams, got 3"):
        pool.add(expand_beam(logprobs, scores, 2))


def test_opcheck(backend):
    logprobs, scores = (t.to(backend.device) for t in draw(2, 3, 40))
    torch.library.opcheck(backend.ops().tree_expand_beam.default, (logprobs, scores, 5))
    pool = on(backend.device, random_pool(2, 30))
    torch.library.opcheck(backend.ops().tree_select.default, (*pool, 9))


def test_growth_compiles_in_one_graph(backend):
    def step(first, second, root_tokens):
        pool = CandidatePool()
        level = expand_beam(first, torch.zeros(first.size(0), 1, device=first.device), 4)
        pool.add(level)
        pool.add(expand_beam(second, level.scores, 4))
        tree, tokens, index = pool.select(root_tokens, 9)
        return tree.parent, tree.ancestors, tokens, index

    first, second = (draw(2, n, 30)[0].to(backend.device) for n in (1, 4))
    arguments = (first, second, torch.tensor([3, 4], device=backend.device))
    for a, b in zip(torch.compile(step, fullgraph=True)(*arguments), step(*arguments), strict=True):
        assert_same_bits(a, b)
