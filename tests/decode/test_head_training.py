"""Training the head: the loss against its formulas, resume, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.decode.cases import exact_model, tiny_model
from tranche.decode import HeadRecipe, JakiroHead, head_loss, train_head

RECIPE = HeadRecipe(steps=6, batch=2, length=12, learning_rate=1e-3)
TEXT = torch.randint(64, (400,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def smooth_l1(a, b):
    """The definition, number by number, averaged over the feature."""
    terms = [0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in (a - b).tolist()]
    return sum(terms) / len(terms)


def soft_cross_entropy(predicted, goal, weight):
    wanted = torch.softmax(weight @ goal, 0)
    return -float((wanted * torch.log_softmax(weight @ predicted, 0)).sum())


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_against_its_formulas(masked):
    first, second = (2 * torch.randn(2, 5, 8) for _ in range(2))
    features, weight = 2 * torch.randn(2, 6, 8), torch.randn(11, 8)
    mask = torch.rand(2, 6) > 0.4 if masked else None
    parts = {}
    for name, predicted, shift in (("first", first, 1), ("second", second, 2)):
        v, p = [], []
        for b in range(2):
            for t in range(5):
                goal = t + shift  # the second output is held against one step further
                if goal > 5 or (mask is not None and not mask[b, goal]):
                    continue
                v.append(smooth_l1(predicted[b, t], features[b, goal]))
                p.append(soft_cross_entropy(predicted[b, t], features[b, goal], weight))
        parts[name] = sum(v) / len(v), sum(p) / len(p)
    loss = head_loss(first, second, features, weight, mask=mask)
    (v1, p1), (v2, p2) = parts["first"], parts["second"]
    got = [loss.feature, loss.token, loss.feature_contrast, loss.token_contrast, loss.total]
    want = [v1, p1, v2, p2, (v1 + 0.5 * v2) + 0.1 * (p1 + 0.5 * p2)]
    assert torch.allclose(torch.stack(got), torch.tensor(want), rtol=1e-5)


def test_the_loss_of_a_plain_head_has_no_second_part():
    first, features, weight = torch.randn(1, 4, 8), torch.randn(1, 5, 8), torch.randn(9, 8)
    loss = head_loss(first, None, features, weight, token_weight=0.3)
    assert loss.feature_contrast == loss.token_contrast == 0
    assert torch.equal(loss.total, loss.feature + 0.3 * loss.token)


def test_a_perfect_head_is_at_the_targets_entropy():
    features, weight = torch.randn(1, 6, 8), torch.randn(9, 8)
    loss = head_loss(features[:, 1:], features[:, 2:], features, weight)
    assert loss.feature == loss.feature_contrast == 0
    p = torch.softmax(features[0, 1:] @ weight.T, -1)
    assert torch.allclose(loss.token, -(p * p.log()).sum(-1).mean())


@pytest.mark.parametrize("mlp", ["moe", "plain"])
def test_training_lowers_the_loss_and_leaves_the_target_alone(model, mlp):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = torch.arange(40).repeat(30)
    recipe = dataclasses.replace(RECIPE, steps=60, learning_rate=3e-3, batch=4)
    fresh = JakiroHead.for_model(model, mlp=mlp)
    head = train_head(model, JakiroHead.for_model(model, mlp=mlp), text, recipe, progress=False)
    with torch.no_grad():
        window = text[None, :30]
        features = model.get_decoder()(input_ids=window).last_hidden_state
        losses = [
            head_loss(*one(window[:, 1:], features[:, :-1]), features, model.lm_head.weight).total
            for one in (fresh, head)
        ]
    assert losses[1] < 0.85 * losses[0]
    assert not head.training and not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_resume_equals_uninterrupted_training(model, tmp_path, monkeypatch, precision):
    recipe = dataclasses.replace(RECIPE, precision=precision)
    whole = train_head(model, None, TEXT, recipe, progress=False)

    steps, step = [], torch.optim.AdamW.step

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    file = tmp_path / "runs" / "head.pt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_head(model, None, TEXT, recipe, checkpoint=file, checkpoint_every=3, progress=False)
    assert torch.load(file, weights_only=True)["step"] == 3
    resumed = train_head(model, None, TEXT, recipe, checkpoint=file, checkpoint_every=3, progress=False)
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    again = train_head(model, None, TEXT, recipe, checkpoint=file, progress=False)  # nothing is left to do
    assert torch.equal(again.fc.weight, whole.fc.weight)


def test_a_checkpoint_of_another_recipe_is_refused(model, tmp_path):
    file = tmp_path / "head.pt"
    train_head(model, None, TEXT, RECIPE, checkpoint=file, progress=False)
    other = dataclasses.replace(RECIPE, seed=1)
    with pytest.raises(ValueError, match=r"'seed': 1.*'seed': 0"):
        train_head(model, None, TEXT, other, checkpoint=file, progress=False)


def test_a_loss_that_is_no_number_is_reported(model):
    head = JakiroHead.for_model(model)
    with torch.no_grad():
        head.fc.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"at step 0.*learning rate"):
        train_head(model, head, TEXT, RECIPE, progress=False)
    assert not head.training


def test_the_target_keeps_its_mode():
    model = tiny_model().train()
    train_head(model, None, TEXT, dataclasses.replace(RECIPE, steps=1), progress=False)
    assert all(module.training for module in model.modules())


def test_a_target_in_bits_trains_a_head():
    head = train_head(exact_model(), None, TEXT, dataclasses.replace(RECIPE, steps=1), progress=False)
    assert all(p.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT[:12], "longer text"),
        (TEXT.float(), "longer text"),
        (TEXT + 1, r"tokens in \[0, 64\)"),
        (TEXT - 1, r"tokens in \[0, 64\)"),
    ],
)
def test_bad_texts(model, text, message):
    with pytest.raises(ValueError, match=message):
        train_head(model, None, text, RECIPE, progress=False)


def test_the_rate_warms_up_and_falls():
    recipe = HeadRecipe(steps=200)
    rates = [recipe.rate(step) for step in range(200)]
    assert recipe.learning_rate == 9e-5
    assert rates[0] < rates[5] < max(rates) <= 9e-5
    assert rates[-1] < 0.11 * 9e-5
