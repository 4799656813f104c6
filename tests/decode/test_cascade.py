"""The cascade: what it chooses, what it tells its drafters, and the text."""

from __future__ import annotations

import pytest
import torch

from tests.decode.cases import OracleDrafter, Scripted, exact_model, ragged_prompts
from tranche.decode import CascadeDrafter, JakiroDrafter, JakiroHead, NgramDrafter, RecyclingDrafter, generate
from tranche.decode.cascade import _Step
from tranche.decode.pace import Pace
from tranche.tree import Tree

NEW = 100
MEASURED = Pace.timed  # which other tests replace by a clock that no load disturbs


@pytest.fixture(scope="module")
def model():
    return exact_model()


@pytest.fixture(scope="module")
def prompts():
    return ragged_prompts(2)


@pytest.fixture(scope="module")
def plain(model, prompts):
    tokens, mask = prompts
    return generate(model, None, tokens, attention_mask=mask, max_new_tokens=NEW, exact=True).sequences


def oracle(plain, prompts, error):
    return OracleDrafter(plain, (1 - prompts[1]).sum(1), error)


def run(model, drafter, prompts, **settings):
    tokens, mask = prompts
    settings = {"max_new_tokens": NEW, "exact": True, "tree_size": 24} | settings
    output = generate(model, drafter, tokens, attention_mask=mask, **settings)
    assert output.statistics.drafter_error is None
    return output


def test_the_better_drafter_is_chosen(model, prompts, plain):
    cascade = CascadeDrafter([oracle(plain, prompts, 1.0), oracle(plain, prompts, 0.05)])
    run(model, cascade, prompts)  # learns
    output = run(model, cascade, prompts)
    assert torch.equal(output.sequences, plain)
    assert cascade.chosen[1] > 3 * cascade.chosen[0]


def simulated(model, steps, outcome):
    """Which drafter was chosen, step by step, where outcome(step, drafter, size) -> (rate, seconds) of a tree."""
    cascade = CascadeDrafter([NgramDrafter(), RecyclingDrafter()])
    cascade.prepare(model, 1, 64, torch.device("cpu"))
    cascade._largest = 24
    paces = cascade._paces(1, 24)
    chosen = []
    for step in range(steps):
        choice, size = cascade._choose(paces)
        rate, seconds = outcome(step, choice, size)
        worth = torch.stack([torch.full((size,), rate), torch.ones(size)])
        cascade._learn(_Step(choice, size, 0.0, seconds, worth), 1)
        chosen.append(choice)
    return chosen


def test_a_drafter_that_costs_more_than_it_gives_is_left_alone(model, monkeypatch):
    monkeypatch.setattr(Pace, "timed", MEASURED)

    def outcome(step, drafter, size):
        return (0.9, 20.0 + size) if drafter == 0 else (0.3, 1.0 + 0.02 * size)

    chosen = simulated(model, 100, outcome)
    assert sum(chosen[20:]) > 70


def test_useless_drafters_end_in_plain_decoding(model, prompts, plain):
    cascade = CascadeDrafter([oracle(plain, prompts, 1.0)])
    run(model, cascade, prompts)
    output = run(model, cascade, prompts)
    assert torch.equal(output.sequences, plain)
    assert output.statistics.mean_tree_size < 4


def test_a_change_of_the_text_is_followed(model):
    """Drafter 0 is right for a hundred steps, then drafter 1, then 0 again."""
    chosen = simulated(
        model, 300, lambda step, drafter, size: (float(drafter == step // 100 % 2), 1.0 + 0.02 * size)
    )
    right = [drafter == step // 100 % 2 for step, drafter in enumerate(chosen)]
    for begin in range(0, 300, 100):
        assert sum(right[begin + 50 : begin + 100]) > 42


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 20, "seed": 11}])
@pytest.mark.parametrize("tree_size", [1, 2, 60])
def test_the_text_does_not_depend_on_it(model, prompts, sampling, tree_size):
    drafters = [NgramDrafter(), RecyclingDrafter(), JakiroDrafter(JakiroHead.for_model(model))]
    settings = sampling | {"max_new_tokens": 36}
    want = run(model, None, prompts, **settings)
    cascade = CascadeDrafter(drafters)
    got = run(model, cascade, prompts, tree_size=tree_size, **settings)
    assert torch.equal(got.sequences, want.sequences)
    assert tree_size == 1 or all(count > 0 for count in cascade.chosen)
    got = run(model, cascade, prompts, tree_size=tree_size, **settings)
    assert torch.equal(got.sequences, want.sequences)


def test_all_drafters_observe_and_one_drafts(model, prompts):
    seen, asked = [0, 0], [0, 0]

    def drafter(which):
        def observe(context, accepted):
            seen[which] += 1

        def propose(context):
            asked[which] += 1
            batch = context.root.size(0)
            return Tree.chain(200, batch), torch.zeros(batch, 200, dtype=torch.int64)  # more than asked for

        return Scripted(propose, observe)

    output = run(model, CascadeDrafter([drafter(0), drafter(1)]), prompts, max_new_tokens=30)
    assert seen[0] == seen[1] == output.statistics.target_passes
    assert 0 < sum(asked) <= output.statistics.target_passes - 1
    assert output.statistics.mean_tree_size <= 24


def test_what_was_learned_is_kept_by_model_and_batch(model, prompts, plain):
    cascade = CascadeDrafter([oracle(plain, prompts, 0.2)])
    run(model, cascade, prompts)
    (paces,) = cascade._known[model].values()
    assert not paces[0].learning
    tokens, mask = prompts
    generate(model, cascade, tokens[:1], attention_mask=mask[:1], max_new_tokens=5, tree_size=24)
    assert len(cascade._known[model]) == 2


def test_no_drafters():
    with pytest.raises(ValueError, match="at least one drafter"):
        CascadeDrafter([])
