"""channel_gate against the reference, in every layout, and its gradients."""

from __future__ import annotations

import pytest
import torch

from tests.pconv.convolutions import same_bits
from tranche.pconv import channel_gate, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape, start=0, dtype=torch.float32, device="cpu"):
    n = shape[1] - start
    x, weight, bias = torch.randn(*shape) * 3 + 1, torch.randn(n, 2 * n) / max(n, 1) ** 0.5, torch.randn(n)
    return [t.to(dtype).to(device) for t in (x, weight, bias)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(2, 24, 9, 7), (1, 37, 1, 2), (3, 5, 1, 40), (5, 100, 2, 3), (1, 3, 20, 15)]
)
@pytest.mark.parametrize("start", [0, 2])
def test_against_reference(backend, shape, dtype, start):
    x, weight, bias = draw(*shape, start=start, dtype=dtype, device=backend.device)
    got = channel_gate(x, start, weight, bias)
    exact = reference.channel_gate(x.double(), start, weight.double(), bias.double())
    plain = reference.channel_gate(x, start, weight, bias)
    assert got.dtype == dtype and got.shape == exact.shape == (shape[0], shape[1] - start)
    assert ((exact > 0) & (exact < 1)).double().mean() > 0.05  # between the ends
    error, yardstick = (got.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * yardstick + (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps


def test_fp64():
    x, weight, bias = draw(2, 20, 17, 19, start=3, dtype=torch.float64)
    torch.testing.assert_close(
        channel_gate(x, 3, weight, bias), reference.channel_gate(x, 3, weight, bias), rtol=1e-12, atol=1e-12
    )


def test_layouts_and_neighbours(backend):
    x, weight, bias = draw(6, 40, 8, 5, start=4, device=backend.device)
    want = channel_gate(x, 4, weight, bias)
    wide = torch.full((6, 43, 8, 7), torch.nan, device=backend.device)
    wide[:, 2:42, :, 1:6] = x
    for view in (x.contiguous(memory_format=torch.channels_last), wide[:, 2:42, :, 1:6]):
        assert same_bits(channel_gate(view, 4, weight, bias), want)
    for i in range(6):
        assert same_bits(channel_gate(x[i : i + 1], 4, weight, bias), want[i : i + 1])


def test_any_number_of_threads():
    x, weight, bias = draw(4, 150, 16, 10)  # enough for both halves to be shared
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(channel_gate(x, 0, weight, bias))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_small_and_strange(backend):
    def gate(*shape, start):
        x, weight, bias = draw(*shape, start=start, device=backend.device)
        return channel_gate(x, start, weight, bias)

    assert gate(2, 6, 1, 1, start=1).isnan().all()  # of one pixel
    assert gate(2, 6, 0, 3, start=2).isnan().all()  # of none
    assert gate(2, 6, 3, 3, start=6).shape == (2, 0)
    assert gate(0, 6, 3, 3, start=2).shape == (0, 4)
    x, weight, bias = draw(2, 6, 3, 3, device=backend.device)
    clean = channel_gate(x, 0, weight, bias)
    x[1, 2, 0, 0] = torch.nan
    got = channel_gate(x, 0, weight, bias)
    assert got[1].isnan().all() and same_bits(got[:1], clean[:1])


def test_gradients():
    x, weight, bias = (t.requires_grad_() for t in draw(2, 4, 3, 2, start=1, dtype=torch.float64))
    inputs = (x, weight, bias)
    assert torch.autograd.gradcheck(lambda x, w, b: channel_gate(x, 1, w, b), inputs)
    assert torch.autograd.gradgradcheck(lambda x, w, b: channel_gate(x, 1, w, b), inputs)


def test_same_gradients_as_reference(backend):
    gradients = []
    for function in (channel_gate, reference.channel_gate):
        torch.manual_seed(1)
        inputs = [t.requires_grad_() for t in draw(2, 6, 4, 5, start=2, device=backend.device)]
        gradients.append(torch.autograd.grad(function(inputs[0], 2, *inputs[1:]).sin().sum(), inputs))
    torch.testing.assert_close(*gradients)


def test_opcheck_and_compile(backend):
    x, weight, bias = draw(1, 6, 3, 4, start=2, device=backend.device)
    op = backend.ops().channel_gate.default
    torch.library.opcheck(op, (x, 2, weight, bias))
    torch.library.opcheck(op, (x.clone().requires_grad_(), 2, weight, bias))
    compiled = torch.compile(channel_gate, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(x, 2, weight, bias), channel_gate(x, 2, weight, bias))


def test_bad_arguments(backend):
    x, weight, bias = draw(1, 6, 3, 4, start=2, device=backend.device)
    with pytest.raises(ValueError, match="start in"):
        channel_gate(x, 7, weight, bias)
    with pytest.raises(ValueError, match="x of shape"):
        channel_gate(x[0], 2, weight, bias)
    with pytest.raises(ValueError, match=r"weight of shape \[C - start, 2 \(C - start\)\]"):
        channel_gate(x, 3, weight, bias)
    with pytest.raises(ValueError, match="bias of shape"):
        channel_gate(x, 2, weight, bias[1:])
    with pytest.raises(ValueError, match="weight of dtype"):
        channel_gate(x, 2, weight.double(), bias)
    with pytest.raises(ValueError, match="x of dtype"):
        channel_gate(x.int(), 2, weight, bias)
