"""DPConv: masks, straight-through gradients, the two losses, and what a search leaves behind."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from tranche.pconv import (
    DPConv,
    PartialConv,
    PartialNet,
    freeze,
    order_loss,
    partial_conv2d,
    resource_at,
    resource_penalty,
)


def with_gates(signs, dim=16):
    module = DPConv(dim)
    with torch.no_grad():
        module.gate.copy_(torch.tensor(signs) * torch.linspace(0.1, 0.4, len(signs)))
    return module


def test_masks_of_all_gates():
    """U by its definition, entry by entry: bit i of row and column must agree unless s_i is 1."""
    for signs in itertools.product([-1.0, 1.0], repeat=4):
        mask = with_gates(signs).mask()
        for row, column in itertools.product(range(16), repeat=2):
            bits = [((row ^ column) >> (3 - i)) & 1 for i in range(4)]
            assert mask[row, column] == all(s > 0 or not bit for s, bit in zip(signs, bits, strict=True))


def test_training_is_a_group_convolution(backend):
    module = with_gates([-1.0, -1.0, 1.0, 1.0]).to(backend.device).train()
    assert module.n_div == 4
    x = torch.randn(2, 16, 5, 6, device=backend.device)
    weight = torch.cat([module.conv.weight[i : i + 4, i : i + 4] for i in range(0, 16, 4)])
    torch.testing.assert_close(module(x), F.conv2d(x, weight, padding=1, groups=4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("signs", [(-1, -1, 1, 1), (1, 1, 1, 1), (-1, -1, -1, -1), (1, -1, 1, -1)])
def test_evaluation_is_a_partial_convolution(backend, signs):
    module = with_gates([float(s) for s in signs]).to(backend.device)
    x = torch.randn(2, 16, 5, 6, device=backend.device)
    trained, evaluated = module.train()(x), module.eval()(x)
    width = 16 // module.n_div
    assert width == 2 ** signs.count(1)
    assert torch.equal(evaluated[:, width:], x[:, width:])
    if list(signs) == sorted(signs):  # zeros first: the first group is the first block
        torch.testing.assert_close(evaluated[:, :width], trained[:, :width], rtol=1e-4, atol=1e-5)
    frozen = module.freeze()
    assert type(frozen) is PartialConv and not frozen.training
    assert torch.equal(frozen(x), evaluated)
    with torch.no_grad():
        module.conv.weight.zero_()
    assert torch.equal(frozen(x), evaluated)


def test_straight_through_gradient():
    module = with_gates([-1.0, 1.0, -1.0, 1.0]).train()
    with torch.no_grad():
        module.gate[3] = 1.5  # out of reach
    x = torch.randn(2, 16, 4, 4)
    upstream = torch.randn(2, 16, 4, 4)
    (module(x) * upstream).sum().backward()
    # the same with the steps as plain variables
    s = module.steps().detach().requires_grad_()
    mask = torch.ones(1, 1)
    for value in s:
        mask = torch.kron(mask, value + (1 - value) * torch.eye(2))
    y = partial_conv2d(x, module.conv.weight.detach() * mask[:, :, None, None], padding=1)
    (gradient,) = torch.autograd.grad((y * upstream).sum(), s)
    want = gradient / 2 * torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(module.gate.grad, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("signs", "first_late"),
    [
        ((-1, -1, 1, 1), None),
        ((1, 1, 1, 1), None),
        ((-1, 1, -1, 1), 2),
        ((1, -1, -1, 1), 1),
        ((1, 1, 1, -1), 3),
    ],
)
def test_order_loss(signs, first_late):
    module = with_gates([float(s) for s in signs])
    loss = module.order_loss()
    want = 0.0 if first_late is None else float(module.gate.detach()[first_late:].abs().sum())
    assert float(loss.detach()) == pytest.approx(want)
    loss.backward()
    late = torch.arange(4) >= (4 if first_late is None else first_late)
    torch.testing.assert_close(module.gate.grad, module.gate.detach().sign() * late)


def test_resource_penalty():
    model = torch.nn.Sequential(with_gates([-1.0, -1.0, 1.0, 1.0]), with_gates([-1.0, 1.0], dim=4))
    resource = sum(float(m.mask().detach().sum()) for m in model)
    assert resource == 16 * 4 + 4 * 2 and [float(m.resource().detach()) for m in model] == [64, 8]
    assert resource_at(model, 4) == (256 + 16) / 4
    assert float(resource_penalty(model, resource).detach()) == 1
    penalty = resource_penalty(model, resource / 2)
    assert float(penalty.detach()) == pytest.approx(0.5**-0.01)
    penalty.backward()
    assert all((m.gate.grad > 0).all() for m in model)  # a lower gate, a smaller convolution
    within = resource_penalty(model, 2 * resource)
    assert float(within.detach()) == 1


def test_freezing_a_network():
    search = PartialNet(3, 5, embed_dim=8, depths=(1, 2), patch_size=2, feature_dim=8, search=True)
    assert float(order_loss(search).detach()) >= 0
    x = torch.randn(2, 3, 8, 8)
    want = search.eval()(x)
    ratios = freeze(search)
    assert list(ratios) == [f"stages.{i}.blocks.{j}.spatial_mixing" for i, j in ((0, 0), (2, 0), (2, 1))]
    assert torch.equal(search(x), want)
    assert not any(isinstance(m, DPConv) for m in search.modules())
    PartialNet(3, 5, embed_dim=8, depths=(1, 2), patch_size=2, n_div=list(ratios.values()), attention=False)
    with pytest.raises(ValueError, match="got none"):
        order_loss(search)


def test_gates_start_near_zero_with_random_signs():
    gates = torch.cat([DPConv(64).gate.detach() for _ in range(50)])
    assert torch.allclose(gates.abs(), torch.tensor(1e-8)) and 100 < int((gates > 0).sum()) < 200


def test_bad_arguments():
    for dim in (1, 12, 0):
        with pytest.raises(ValueError, match="power of two"):
            DPConv(dim)
    with pytest.raises(ValueError, match="odd kernel_size"):
        DPConv(8, 4)
    with pytest.raises(ValueError, match="a model around"):
        freeze(DPConv(8))
