"""Joint training: the rates of the scales, mixed precisions, allocation, checkpoints, losses that are no numbers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tranche.bits import (
    ALRS,
    HASBSampler,
    JointTrainer,
    allocate_bits,
    hessian_traces,
    prepare_qat,
    weight_errors,
)
from tranche.bits.training import scale_parameters

PRECISIONS = (8, 6, 4, 2)


# ---- ALRS ---------------------------------------------------------------------------------------------------------


def scales_with(*gradients):
    parameters = [nn.Parameter(torch.ones(len(g))) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return torch.optim.SGD(parameters, 1.0)


def test_eta():
    alrs = ALRS(scales_with([0.0]))
    want = {8: 1, 7: 0.5, 6: 0.1, 5: 0.05, 4: 0.01, 3: 0.005, 2: 0.001}
    assert {bits: pytest.approx(alrs.eta(bits)) for bits in want} == want


def test_rate_of_the_scales():
    gradients = ([0.2, -0.4], [-3.0, 0.1])  # the larger ones: 0.4, and 1 after the clip
    optimizer = scales_with(*gradients)
    assert ALRS(optimizer, 0.5).step(4) == pytest.approx(0.01 * 0.5 * (1 - 0.7))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5 * 0.3)
    assert ALRS(optimizer, 0.5, as_printed=True).step(4) == pytest.approx(
        0.01 * (0.5 - 0.7)
    )  # negative, as printed
    assert ALRS(scales_with([2.0], [-2.0]), 0.5).step(8) == 0


# ---- HASB ---------------------------------------------------------------------------------------------------------


def test_draws_of_bits():
    sampler = HASBSampler({"calm": 1.0, "sensitive": 9.0}, PRECISIONS, seed=1)
    assert sampler.probabilities("calm").tolist() == [0.25] * 4
    assert sampler.probabilities("sensitive").tolist() == [0.4, 0.3, 0.2, 0.1]
    assert all(sampler.sample(0.0) is None for _ in range(20))
    drawn = [sampler.sample(1.0) for _ in range(4000)]
    share = sum(d["sensitive"] == 8 for d in drawn) / len(drawn)
    assert abs(share - 0.4) < 0.03
    assert abs(sum(sampler.sample(0.3) is not None for _ in range(2000)) / 2000 - 0.3) < 0.05


# ---- allocation ---------------------------------------------------------------------------------------------------


def test_traces_of_a_quadratic():
    torch.manual_seed(0)
    w, v = torch.randn(5, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    curvature = torch.rand(5, 3)
    loss = (curvature * w**2).sum() + 3 * (v.sum() ** 2)
    traces = hessian_traces(loss, {"w": w, "v": v, "unused": torch.ones(1, requires_grad=True)}, samples=400)
    assert traces["w"] == pytest.approx(2 * float(curvature.sum()), rel=1e-5)  # a diagonal is found at once
    assert traces["v"] == pytest.approx(24, rel=0.2)
    assert traces["unused"] == 0


def test_allocation_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for mean in (3.0, 4.0, 5.5):
        traces = {f"layer{i}": float(torch.rand((), generator=generator)) for i in range(4)}
        errors = {
            name: {b: float(torch.rand((), generator=generator)) * 4.0**-b for b in PRECISIONS}
            for name in traces
        }
        sizes = {name: 1 + i for i, name in enumerate(traces)}
        got = allocate_bits(traces, errors, mean, sizes=sizes)

        def cost(chosen, traces=traces, errors=errors):
            return sum(traces[name] * errors[name][b] for name, b in chosen.items())

        every = (dict(zip(traces, c, strict=True)) for c in itertools.product(PRECISIONS, repeat=4))
        allowed = [c for c in every if sum(sizes[n] * b for n, b in c.items()) <= mean * sum(sizes.values())]
        assert cost(got) == pytest.approx(min(map(cost, allowed)))
        assert sum(sizes[n] * b for n, b in got.items()) <= mean * sum(sizes.values())


def test_sensitive_layers_get_more_bits():
    torch.manual_seed(0)
    weights = {"calm": torch.randn(8, 8), "sensitive": torch.randn(8, 8)}
    errors = weight_errors(weights, PRECISIONS)
    assert errors["calm"][2] > errors["calm"][4] > errors["calm"][8] > 0
    chosen = allocate_bits({"calm": 0.01, "sensitive": 10.0}, errors, 5)
    assert chosen["sensitive"] > chosen["calm"]


def test_allocation_refuses():
    with pytest.raises(ValueError, match="expected mean_bits >= 2, got 1"):
        allocate_bits({"a": 1.0}, {"a": {2: 1.0, 4: 0.1}}, 1)
    with pytest.raises(ValueError, match="expected errors of the layers of traces"):
        allocate_bits({"a": 1.0}, {"b": {2: 1.0}}, 4)


# ---- the loop -----------------------------------------------------------------------------------------------------


def trainer(seed=0, sampler=False):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)
    )
    prepare_qat(model)
    scales = scale_parameters(model)
    others = [p for p in model.parameters() if all(p is not s for s in scales)]
    scale_optimizer = torch.optim.SGD(scales, 1e-4)
    return JointTrainer(
        model,
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        torch.optim.AdamW(others, 1e-2),
        scale_optimizer,
        alrs=ALRS(scale_optimizer),
        sampler=HASBSampler({"1": 1.0}) if sampler else None,
    )


def batches(count):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 16, 6, generator=generator)
    return [(one, (one[:, 0] > 0).long() + (one[:, 1] > 1).long()) for one in x]


def test_all_precisions_learn():
    joint = trainer()
    first = joint.epoch(batches(10))
    for _ in range(5):
        last = joint.epoch(batches(10))
    assert all(last[bits] < 0.6 * first[bits] for bits in PRECISIONS)


def test_resumed_training_is_uninterrupted_training():
    data = batches(8)
    whole = trainer(sampler=True)
    for i, batch in enumerate(data):
        whole.step(batch, i / 8)
    half = trainer(sampler=True)
    for i, batch in enumerate(data[:4]):
        half.step(batch, i / 8)
    saved = copy.deepcopy(half.state_dict())
    resumed = trainer(seed=7, sampler=True)
    resumed.load_state_dict(saved)
    for i, batch in enumerate(data[4:], 4):
        resumed.step(batch, i / 8)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert resumed.batches == 8


def test_a_loss_that_is_no_number_stops_training():
    joint = trainer()
    joint.step(batches(1)[0])
    before = copy.deepcopy(joint.model.state_dict())
    x, y = batches(1)[0]
    with pytest.raises(FloatingPointError, match="the loss became nan at 8 bits, in batch 1"):
        joint.step((x * torch.nan, y))
    for name, value in joint.model.state_dict().items():
        if "running" not in name and "tracked" not in name:  # forward passes see the data
            assert torch.equal(value, before[name])
