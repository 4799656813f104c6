"""The text is that of plain decoding, whatever the drafter, the batch, the padding and the sampling."""

from __future__ import annotations

import pytest
import torch

from tests.decode.cases import CONFIGS, OracleDrafter, drafters, exact_model, ragged_prompts, tiny_model
from tranche.decode import generate
from tranche.tree import sample

NEW = 40
SAMPLING = {
    "greedy": {},
    "sampling": {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 11},
    "mixed": {
        "temperature": torch.tensor([0.0, 1.0, 0.7]),
        "top_k": torch.tensor([0, 5, 0]),
        "top_p": torch.tensor([1.0, 0.9, 1.0]),
        "seed": torch.tensor([3, 3, 5]),
    },
}


@pytest.fixture(scope="module")
def model():
    return exact_model()


@pytest.mark.parametrize("name", drafters())
@pytest.mark.parametrize("sampling", ["greedy", "sampling"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_drafter_equals_plain_decoding(model, name, sampling, batch):
    tokens, mask = ragged_prompts(batch)
    settings = SAMPLING[sampling] | {"attention_mask": mask, "max_new_tokens": NEW, "exact": True}
    plain = generate(model, None, tokens, **settings)
    fast = generate(model, drafters()[name], tokens, **settings)
    assert torch.equal(fast.sequences, plain.sequences)
    assert fast.statistics.guarantee == "exact"
    assert fast.statistics.drafter_error is None
    assert plain.statistics.target_passes == NEW
    if name.endswith(("-none", "-all")):  # the draft is the target
        assert fast.statistics.target_passes < NEW / 3


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("error", [0.05, 0.4])
def test_random_trees_around_the_right_path(model, sampling, error):
    tokens, mask = ragged_prompts(3)
    settings = SAMPLING[sampling] | {"attention_mask": mask, "max_new_tokens": 60, "exact": True}
    plain = generate(model, None, tokens, **settings)
    oracle = OracleDrafter(plain.sequences, (1 - mask).sum(1), error)
    fast = generate(model, oracle, tokens, tree_size=24, **settings)
    assert torch.equal(fast.sequences, plain.sequences)
    assert fast.statistics.drafter_error is None
    assert fast.statistics.tokens_per_pass > 1.5


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_every_family_of_models(kind, dtype, activation_bits):
    model = exact_model(kind, dtype, activation_bits)
    tokens, mask = ragged_prompts(2)
    settings = {"attention_mask": mask, "max_new_tokens": 30, "exact": True}
    plain = generate(model, None, tokens, **settings)
    fast = generate(model, drafters()["layerskip"], tokens, **settings)
    assert plain.statistics.guarantee == "exact", plain.statistics.reason
    assert torch.equal(fast.sequences, plain.sequences)


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_text_is_that_of_transformers(kind):
    model = tiny_model(kind)
    tokens, mask = ragged_prompts(3)
    ours = generate(model, drafters()["recycling"], tokens, attention_mask=mask, max_new_tokens=NEW)
    assert ours.statistics.guarantee == "up to ties"
    for row in range(3):
        prompt = tokens[row, mask[row].bool()][None]
        theirs = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        assert torch.equal(ours.sequences[row, tokens.size(1) :], theirs[0, prompt.size(1) :])


def test_sampled_text_is_drawn_from_the_models_logits():
    model = tiny_model()
    tokens, _ = ragged_prompts(1)
    ours = generate(
        model, drafters()["ngram"], tokens, max_new_tokens=NEW, temperature=1.0, top_p=0.9, seed=5
    )
    text = tokens
    with torch.no_grad():
        for _ in range(NEW):
            drawn = sample(
                model(text).logits[:, -1], temperature=1.0, top_p=0.9, seed=5, position=text.size(1)
            )
            text = torch.cat([text, drawn[:, None]], 1)
    assert torch.equal(ours.sequences, text)


@pytest.mark.parametrize("sampling", ["greedy", "sampling"])
def test_a_row_equals_itself_alone_on_either_side_of_the_padding(model, sampling):
    settings = SAMPLING[sampling] | {"max_new_tokens": NEW, "exact": True}
    new = {}
    for side in ("left", "right"):
        tokens, mask = ragged_prompts(3, side)
        tokens = torch.where(mask.bool(), tokens, 63)
        if side == "right":  # the same prompts as on the left
            for row in range(3):
                count = int(mask[row].sum())
                tokens[row, :count] = new["prompts"][row]
        else:
            new["prompts"] = [tokens[row, mask[row].bool()] for row in range(3)]
        made = generate(model, drafters()["bitswitch"], tokens, attention_mask=mask, **settings)
        assert torch.equal(made.sequences[:, : tokens.size(1)], tokens)
        new[side] = made.sequences[:, tokens.size(1) :]
    assert torch.equal(new["left"], new["right"])
    for row, prompt in enumerate(new["prompts"]):
        alone = dict(settings)
        if "seed" in alone:
            alone["seed"] += row
        made = generate(model, drafters()["recycling"], prompt[None], **alone)
        assert torch.equal(made.sequences[0, prompt.numel() :], new["left"][row])


def test_a_prompt_of_several_chunks(model, monkeypatch):
    monkeypatch.setattr("tranche.decode.loop._CHUNK", 4)
    tokens, mask = ragged_prompts(3)
    settings = {"attention_mask": mask, "max_new_tokens": 20, "exact": True}
    chunked = generate(model, drafters()["recycling"], tokens, **settings)
    assert chunked.statistics.target_passes < 3 + 20
    monkeypatch.undo()
    assert torch.equal(chunked.sequences, generate(model, None, tokens, **settings).sequences)


def test_simulated_kernels(backend):
    model = exact_model(num_hidden_layers=1).to(backend.device)
    tokens, mask = (x.to(backend.device) for x in ragged_prompts(2, longest=5))
    settings = {"attention_mask": mask, "max_new_tokens": backend.pick(20, 5), "exact": True}
    plain = generate(model, None, tokens, **settings)
    fast = generate(model, drafters()["layerskip-none"], tokens, tree_size=5, **settings)
    assert torch.equal(fast.sequences, plain.sequences)
