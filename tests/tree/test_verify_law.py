"""The joint law of (path, next token): the rule by enumeration, the op by statistics, published defects by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from scipy import stats

from tests.tree.walks import repeated, tree_of
from tranche.tree import reference, verify_sample

VOCAB = 4
CUTS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.4, "top_k": 2},
    {"temperature": 0.9, "top_p": 0.75},
    {"temperature": 0.8, "top_k": 3, "top_p": 0.8},
]
# two levels with a pair of equal siblings, and a third level below one of them
PARENTS = [-1, 0, 0, 0, 1, 1, 3, 4]
TOKENS = [0, 2, 1, 1, 0, 3, 2, 1]

Law = dict[tuple[int, ...], float]


def table(seed: int = 0) -> torch.Tensor:
    """Logits [V, V] of a Markov chain: the row of the last token."""
    return 1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)).double()


def rows_of(logits: torch.Tensor, **options: float) -> torch.Tensor:
    """The distribution after each token."""
    return torch.stack([reference.probabilities(row, **options) for row in logits])


def total_variation(a: Law, b: Law) -> float:
    return sum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in a.keys() | b.keys()) / 2


def plain_law(p: torch.Tensor, start: int, length: int) -> Law:
    """The law of texts of `length` tokens drawn one after the other."""
    law = {}
    for text in itertools.product(range(VOCAB), repeat=length):
        chance = 1.0
        for before, token in zip((start, *text), text, strict=False):
            chance *= float(p[before, token])
        law[text] = chance
    return law


def extended(law: Law, p: torch.Tensor, length: int) -> Law:
    """Texts of different lengths, each continued to `length` tokens by drawing one after the other."""
    result: Law = {}
    for text, chance in law.items():
        missing = length - len(text)
        continuations = plain_law(p, text[-1], missing) if missing > 0 else {(): 1.0}
        for rest, factor in continuations.items():
            whole = (*text, *rest)[:length]
            result[whole] = result.get(whole, 0.0) + chance * factor
    return result


def walked(law: dict[tuple[tuple[int, ...], int], float]) -> Law:
    texts: Law = {}
    for (path, token), chance in law.items():
        text = (*(TOKENS[node] for node in path[1:]), token)
        texts[text] = texts.get(text, 0.0) + chance
    return texts


@pytest.mark.parametrize("options", CUTS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_rule_gives_the_targets_law(options, seed):
    """Total variation 0: temperature, top-k and top-p hold at every depth, the bonus token's included."""
    p = rows_of(table(seed), **options)
    law = walked(reference.walk_law(TOKENS, PARENTS, p[TOKENS]))
    assert total_variation(extended(law, p, 4), plain_law(p, TOKENS[0], 4)) < 1e-6


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_the_op_follows_the_joint_law(backend, options):
    """Chi-square of (path, next token) over many seeds, against the enumerated law."""
    draws = backend.pick(60_000, 12)
    logits = table().float()
    rounded = {name: torch.tensor(value).item() for name, value in options.items()}
    law = reference.walk_law(TOKENS, PARENTS, rows_of(logits, **rounded)[TOKENS])
    tree = repeated(tree_of(torch.tensor([PARENTS], dtype=torch.int32)), draws).to(backend.device)
    tokens = torch.tensor(TOKENS).repeat(draws, 1).to(backend.device)
    rows = logits[TOKENS].to(backend.device).expand(draws, len(TOKENS), VOCAB)
    accepted = verify_sample(tokens, tree, rows, **options, seed=1000, position=17)
    counts: dict[tuple[tuple[int, ...], int], int] = {}
    for path, token in zip(accepted.path.tolist(), accepted.next_token.tolist(), strict=True):
        key = (tuple(node for node in path if node >= 0), token)
        counts[key] = counts.get(key, 0) + 1
    assert counts.keys() <= law.keys()
    likely = [key for key in law if law[key] * draws >= 5]
    observed = [counts.get(key, 0) for key in likely]
    expected = [law[key] * draws for key in likely]
    rest = draws * (1 - sum(law[key] for key in likely))
    if rest > 1:
        observed.append(draws - sum(observed))
        expected.append(rest)
    if len(expected) > 1:
        expected = [value * sum(observed) / sum(expected) for value in expected]
        assert stats.chisquare(observed, expected).pvalue > 1e-3


# ---- published defects: the enumeration tells each from the rule ---------------------------------------------------

Bonus = Callable[[int], torch.Tensor]


def law_with_bonus(p: torch.Tensor, bonus: torch.Tensor) -> Law:
    """The walk, but the token after the last accepted node is drawn anew from `bonus`, given that it is no child."""
    law: dict[tuple[tuple[int, ...], int], float] = {}
    for (path, _), chance in reference.walk_law(TOKENS, PARENTS, p[TOKENS]).items():
        node = path[-1]
        children = {TOKENS[i] for i in range(len(TOKENS)) if PARENTS[i] == node}
        allowed = torch.tensor([token not in children for token in range(VOCAB)])
        q = torch.where(allowed, bonus[TOKENS[node]], 0)
        for token in range(VOCAB):
            law[path, token] = law.get((path, token), 0.0) + chance * float(q[token] / q.sum())
    return walked(law)


def test_defect_temperature_and_top_p_skipped_for_the_bonus_token():
    logits = table(1)
    p = rows_of(logits, temperature=0.6, top_p=0.75)
    wrong = law_with_bonus(p, rows_of(logits))
    right = law_with_bonus(p, p)
    target = plain_law(p, TOKENS[0], 4)
    assert total_variation(extended(right, p, 4), target) < 1e-6
    assert total_variation(extended(wrong, p, 4), target) > 0.1


def test_defect_min_1_p_over_q_for_deterministic_children():
    """A child that a top-k put there has q = 1 there, whatever the draft's softmax says."""
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    draft = torch.tensor([0.5, 0.5], dtype=torch.float64)  # both accepted with min(1, p / q) = 1
    wrong = {(0,): min(1.0, float(p[0] / draft[0]))}
    wrong[(1,)] = 1 - wrong[(0,)]
    law = reference.walk_law([0, 0], [-1, 0], p.expand(2, 2))
    right = {(0,): sum(c for (path, _), c in law.items() if len(path) == 2)}
    right[(1,)] = 1 - right[(0,)]
    target = {(token,): float(p[token]) for token in range(2)}
    assert total_variation(right, target) < 1e-12
    assert total_variation(wrong, target) == pytest.approx(0.5)


def test_defect_a_static_variant_that_is_not_lossless(backend):
    """A static tree fixes ranks, not tokens: with the same walk its law is the target's as well."""
    p = rows_of(table(2), temperature=1.0)
    ranked = p.argsort(dim=1, descending=True)
    parents, tokens = [-1, 0, 0, 1, 1, 2], [0]
    for i in range(1, 6):
        rank = sum(parents[j] == parents[i] for j in range(i))
        tokens.append(int(ranked[tokens[parents[i]], rank]))
    law = reference.walk_law(tokens, parents, p[tokens])
    texts: Law = {}
    for (path, token), chance in law.items():
        text = (*(tokens[node] for node in path[1:]), token)
        texts[text] = texts.get(text, 0.0) + chance
    assert total_variation(extended(texts, p, 3), plain_law(p, 0, 3)) < 1e-6


def test_defect_p_0_accepted_at_r_0(backend):
    """A child whose probability is 0 (cut, or -inf) is never accepted, at the smallest u found and at many others."""
    smallest = min(range(5000), key=lambda seed: reference.uniform(seed, 0))
    tree = tree_of(torch.tensor([[-1, 0]], dtype=torch.int32)).to(backend.device)
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=backend.device)
    logits = torch.tensor([-torch.inf, 0.0, 1.0]).to(backend.device).expand(1, 2, 3)
    for seed in (smallest, *range(backend.pick(20, 2))):
        seeds = torch.tensor([seed], device=backend.device)
        assert verify_sample(tokens, tree, logits, temperature=1.0, seed=seeds, position=0).length.item() == 0
    finite = torch.tensor([-3.0, 0.0, 1.0]).to(backend.device).expand(1, 2, 3)
    for options in ({"top_k": 2}, {"top_p": 0.9}, {"temperature": 0.0}):
        sampling = {"temperature": 1.0, **options}
        seeds = torch.tensor([smallest], device=backend.device)
        assert verify_sample(tokens, tree, finite, **sampling, seed=seeds, position=0).length.item() == 0


def test_defect_uninitialised_draft_probabilities(backend):
    """No draft probability takes part: the schema has none, and equal calls give equal bits."""
    schema = str(backend.ops().tree_verify_sample.default._schema)
    assert "draft" not in schema
    assert "prob" not in schema
    tree = tree_of(torch.tensor([PARENTS], dtype=torch.int32)).to(backend.device)
    tokens = torch.tensor([TOKENS], device=backend.device)
    rows = table().float()[TOKENS][None].to(backend.device)
    results = [verify_sample(tokens, tree, rows, temperature=1.0, seed=5, position=0) for _ in range(4)]
    for other in results[1:]:
        assert torch.equal(other.path, results[0].path)
        assert torch.equal(other.next_token, results[0].next_token)
