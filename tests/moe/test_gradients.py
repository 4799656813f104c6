"""Backward of the family, against finite differences and against autograd through the reference."""

from __future__ import annotations

import pytest
import torch

from tests.moe.cases import make_head, make_layer
from tranche.moe import autograd, draft_moe, fused_experts, reference, route


def leaves(*tensors):
    return tuple(None if t is None else t.detach().clone().requires_grad_() for t in tensors)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_experts(gated, activation):
    layer = make_layer(
        1, tokens=4, hidden=5, inner=3, experts=4, dtype=torch.float64, gated=gated, device="cpu"
    )
    inputs = leaves(*layer.tensors()[:5])

    def run(*tensors):
        return fused_experts(*tensors, layer.ids, activation=activation)

    assert torch.autograd.gradcheck(run, inputs)


def test_experts_without_tokens_get_zeros(backend):
    layer = make_layer(2, tokens=3, experts=5, top_k=1, device=backend.device)
    layer.ids.fill_(2)
    inputs = leaves(*layer.tensors()[:5])
    fused_experts(*inputs, layer.ids).sum().backward()
    for w in inputs[1:4]:
        assert w.grad[2].abs().max() > 0
        assert torch.equal(w.grad[[0, 1, 3, 4]], torch.zeros_like(w.grad[[0, 1, 3, 4]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_against_the_reference(backend, dtype):
    layer = make_layer(3, tokens=12, dtype=dtype, device=backend.device)
    inputs, exact = leaves(*layer.tensors()[:5]), leaves(*(t.double() for t in layer.tensors()[:5]))
    grad = torch.randn_like(layer.x)
    fused_experts(*inputs, layer.ids).backward(grad)
    reference.fused_experts(*exact, layer.ids).backward(grad.double())
    for a, b in zip(inputs, exact, strict=True):
        assert a.grad.dtype == a.dtype
        tolerance = 20 * torch.finfo(dtype).eps * float(b.grad.abs().max())
        assert torch.allclose(a.grad.double(), b.grad, atol=tolerance)


@pytest.mark.parametrize("gated", [True, False])
def test_the_grouped_form_is_the_loop(gated):
    """What CUDA runs for bf16 where experts outnumber the choices."""
    layer = make_layer(9, tokens=12, experts=6, hidden=48, inner=40, dtype=torch.bfloat16, gated=gated)
    layer.ids[layer.ids == 2] = 3  # an expert without tokens
    layer.ids[5, 1] = -1  # no expert
    chosen = torch.where(layer.ids < 0, 6, layer.ids).flatten().long()
    coefficients = torch.stack([layer.weights, -layer.weights])
    grads = [torch.randn_like(layer.x) for _ in range(2)]
    arguments = (grads, *layer.tensors()[:4], coefficients)
    loop = autograd.experts_backward(*arguments, layer.ids, 0)
    of_x, of_coefficients, of_gate, of_up, of_down = autograd._grouped_backward(*arguments, chosen, 0)
    if not gated:
        assert of_gate is None
        of_gate = loop[1]
    for got, want in zip((of_x, of_gate, of_up, of_down, of_coefficients), loop, strict=True):
        assert got.dtype == want.dtype
        assert torch.allclose(
            got.float(), want.float(), atol=0.02 * float(want.abs().max() if want.numel() else 1)
        )
    assert torch.equal(of_up[2], torch.zeros_like(of_up[2]))
    assert torch.equal(of_x[5] == 0, loop[0][5] == 0)


@pytest.mark.parametrize(("experts", "variant", "top_k"), [(2, "jakiro", 2), (4, "topk", 3), (3, "topk", 1)])
@pytest.mark.parametrize("contrast", [True, False])
def test_draft(experts, variant, top_k, contrast):
    contrast = contrast and top_k > 1
    head = make_head(4, tokens=4, hidden=5, inner=3, experts=experts, dtype=torch.float64, residual=True)
    *inputs, residual = leaves(*head.tensors(), head.options["residual"])

    def run(*tensors):
        *others, added = tensors
        return draft_moe(*others, residual=added, contrast=contrast, variant=variant, top_k=top_k)

    assert torch.autograd.gradcheck(run, (*inputs, residual))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "relu_rms"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_route(score, renormalize):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)

    def run(x, weight):
        return route(x, weight, 2, score=score, renormalize=renormalize, scale=1.5)[0]

    assert torch.autograd.gradcheck(run, (x, weight))


def test_route_rms_weight(backend):
    generator = torch.Generator().manual_seed(6)
    x, weight = torch.randn(4, 6, generator=generator), torch.randn(5, 6, generator=generator)
    x, weight = x.to(backend.device), weight.to(backend.device)
    gain, exact = leaves(torch.rand(5, generator=generator).to(backend.device)), None
    exact = gain[0].detach().clone().requires_grad_()
    route(x, weight, 2, score="relu_rms", renormalize=False, rms_weight=gain[0])[0].sum().backward()
    reference.route(x, weight, 2, score="relu_rms", renormalize=False, rms_weight=exact)[0].sum().backward()
    assert torch.allclose(gain[0].grad, exact.grad, atol=1e-5)


def test_int8_weights_are_not_trained():
    layer = make_layer(7)
    integers = [w.to(torch.int8) for w in (layer.w_gate, layer.w_up, layer.w_down)]
    scales = {
        f"{n}_scale": torch.ones(w.shape[:2])
        for n, w in zip(("w_gate", "w_up", "w_down"), integers, strict=True)
    }
    with pytest.raises(ValueError, match="expected weights of integers without gradients"):
        fused_experts(layer.x.requires_grad_(), *integers, layer.weights, layer.ids, **scales)


def test_a_compiled_training_step(backend):
    layer = make_layer(8, device=backend.device)

    def loss(*tensors):
        return fused_experts(*tensors, layer.ids).square().sum()

    plain, compiled = leaves(*layer.tensors()[:5]), leaves(*layer.tensors()[:5])
    loss(*plain).backward()
    torch.compile(loss, fullgraph=True)(*compiled).backward()
    for a, b in zip(plain, compiled, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)
