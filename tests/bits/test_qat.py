"""QAT modules: what they compute is what the integer modules compute after conversion."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tranche.bits import (
    BitSwitchConv2d,
    BitSwitchLinear,
    QATConv2d,
    QATLinear,
    SwitchBatchNorm,
    at_bits,
    calibrate,
    convert_qat,
    prepare_qat,
    set_bits,
)

PRECISIONS = (8, 6, 4, 2)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=(1, 0)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4 * 3, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )


def trained_a_little(activations):
    model = prepare_qat(conv_net(), activations=activations)
    x = torch.randn(6, 1, 8, 8)
    if activations == "learned":
        calibrate(model, x, PRECISIONS)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for bits in PRECISIONS:
        with at_bits(model, bits):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), x


@pytest.mark.parametrize("activations", [None, 8, "learned"])
def test_converted_modules_compute_the_same(activations):
    model, x = trained_a_little(activations)
    integer = convert_qat(copy.deepcopy(model))
    kinds = [type(module) for module in integer.modules()]
    assert kinds.count(BitSwitchConv2d) == 2 and kinds.count(BitSwitchLinear) == 1
    assert QATConv2d not in kinds and QATLinear not in kinds
    for bits in PRECISIONS:
        with torch.no_grad(), at_bits(model, bits), at_bits(integer, bits):
            want, got = model(x), integer(x)
        # activations on the edge between two codes may fall to either side
        close = (got - want).abs() <= 1e-4 * want.abs().max()
        assert close.float().mean() >= (1.0 if activations is None else 0.9), bits


@pytest.mark.parametrize("activations", [None, 8, "learned"])
def test_one_layer_converts_exactly(activations):
    """Without another layer's rounding before it, every output agrees to rounding."""
    x = torch.randn(7, 40)
    for module, inputs in ((nn.Linear(40, 9), x), (nn.Conv2d(5, 4, 3, padding=1), torch.randn(2, 5, 6, 7))):
        model = prepare_qat(nn.Sequential(module), activations=activations, skip=())
        if activations == "learned":
            calibrate(model, inputs, PRECISIONS)
            model[0].activations.zero.data += 0.05
        with torch.no_grad():
            model[0].scale *= 0.7
        integer = convert_qat(copy.deepcopy(model))
        for bits in PRECISIONS:
            set_bits(model, bits)
            set_bits(integer, bits)
            with torch.no_grad():
                torch.testing.assert_close(integer(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def test_prepare():
    model = conv_net()
    weight = model[1].weight
    assert prepare_qat(model) is model
    assert isinstance(model[0], nn.Conv2d) and isinstance(model[9], nn.Linear)
    assert isinstance(model[1], QATConv2d) and isinstance(model[2], SwitchBatchNorm)
    assert model[1].weight is weight
    with pytest.raises(ValueError, match="expected names of modules in skip"):
        prepare_qat(conv_net(), skip=("nothing",))


def test_each_precision_has_its_statistics():
    model = prepare_qat(nn.Sequential(nn.BatchNorm1d(3))).train()
    with at_bits(model, 4):
        model(torch.randn(50, 3) + 5)
    norms = model[0].norms
    assert norms["4"].running_mean.abs().min() > 0.1 and not norms["8"].running_mean.any()
    with (
        pytest.raises(ValueError, match=r"expected bits in \['8', '6', '4', '2'\], got 3"),
        at_bits(model, 3),
    ):
        model(torch.randn(4, 3))


def test_learned_grids_refuse_bits_that_were_not_named():
    model = prepare_qat(nn.Sequential(nn.Linear(4, 4)), activations="learned", precisions=(8, 4), skip=())
    with pytest.raises(ValueError, match=r"expected bits in \[8, 4\], got 2"), at_bits(model, 2):
        model(torch.randn(2, 4))


def test_not_a_number_is_seen_through_learned_grids():
    model = prepare_qat(nn.Sequential(nn.Linear(4, 4)), activations="learned", skip=())
    x = torch.randn(3, 4)
    calibrate(model, x, PRECISIONS)
    x[1, 2] = torch.nan
    integer = convert_qat(copy.deepcopy(model))
    for module in (model, integer):
        assert module(x).isnan().any(1).tolist() == [False, True, False]
