"""What stands between a model's matrix products: right, and the same for a row whatever stands beside it."""

from __future__ import annotations

import pytest
import torch

from tranche import rows

TYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [1, 15, 64, 100, 257, 5000]


def within_rule(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """An error of at most twice that of plain torch in the same dtype, plus one rounding."""
    allowed = 2 * (plain.double() - truth).abs().max() + torch.finfo(got.dtype).eps * truth.abs().max()
    assert (got.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(backend, dtype, width):
    gate, up = (4 * torch.randn(backend.pick(7, 2), width, device=backend.device).to(dtype) for _ in range(2))
    truth = rows.silu_mul_reference(gate.double(), up.double())
    within_rule(rows.silu_mul(gate, up), rows.silu_mul_reference(gate, up), truth)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(backend, dtype, width):
    x = 3 * torch.randn(backend.pick(7, 2), width, device=backend.device).to(dtype)
    weight = torch.randn(width, device=backend.device).to(dtype)
    truth = rows.rms_norm_reference(x.double(), weight.double(), 1e-5)
    within_rule(rows.rms_norm(x, weight, 1e-5), rows.rms_norm_reference(x, weight, 1e-5), truth)


def test_exact_values(backend):
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0] * 4], device=backend.device)  # mean of squares 6.25
    weight = torch.full((16,), 5.0, device=backend.device)
    assert torch.equal(rows.rms_norm(x, weight, 0.0), 2 * x)
    zero = torch.zeros(2, 3, device=backend.device)
    assert torch.equal(rows.silu_mul(zero, zero + 7), zero)


def test_extreme_values(backend):
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([[-200.0, -88.0, 200.0, inf, nan]], device=backend.device)
    out = rows.silu_mul(gate, torch.ones_like(gate))[0]
    assert abs(out[0]) < 1e-30 and abs(out[1]) < 1e-30 and out[2] == 200.0 and out[3] == inf
    assert out[4].isnan()
    x = torch.ones(3, 70, device=backend.device)
    x[1, 69] = nan
    out = rows.rms_norm(x, torch.ones(70, device=backend.device), 1e-6)
    assert out[1].isnan().all() and out[0].isfinite().all() and torch.equal(out[0], out[2])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [1, 17, 80, 129, 4097])
def test_a_row_is_itself_alone(backend, dtype, width):
    """Rule 5: neither the other rows, nor strides, nor the number of threads change a bit."""
    count = backend.pick(60, 4)
    storage = torch.randn(2, count, width + 3, device=backend.device).to(dtype)
    gate, up = storage[0, :, :width], storage[1, :, 3:]
    weight = torch.randn(width, device=backend.device).to(dtype)
    both = rows.silu_mul(gate, up), rows.rms_norm(gate, weight, 1e-5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for i in range(0, count, 3):
            assert torch.equal(rows.silu_mul(gate[i].clone(), up[i].clone()), both[0][i])
            assert torch.equal(rows.rms_norm(gate[i : i + 1].clone(), weight, 1e-5)[0], both[1][i])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3)])
def test_empty(backend, shape):
    x = torch.empty(shape, device=backend.device)
    assert rows.silu_mul(x, x).shape == x.shape
    assert rows.rms_norm(x, torch.ones(shape[-1], device=backend.device), 1e-5).shape == x.shape


def test_opcheck(backend):
    x = torch.randn(3, 20, device=backend.device)
    torch.library.opcheck(backend.ops().row_silu_mul.default, (x, x + 1))
    torch.library.opcheck(backend.ops().row_rms_norm.default, (x, x[0].clone(), 1e-5))


def test_bad_input(backend):
    x = torch.ones(3, 8, device=backend.device)
    with pytest.raises(
        ValueError, match=r"tranche.row_silu_mul: expected up.size\(1\) == gate.size\(1\) \(8\)"
    ):
        rows.silu_mul(x, x[:, :4])
    with pytest.raises(ValueError, match=r"expected up of dtype torch\.float32, got torch\.float16"):
        rows.silu_mul(x, x.half())
    with pytest.raises(ValueError, match=r"tranche.row_rms_norm: expected weight of shape \[H\] = \[8\]"):
        rows.rms_norm(x, x[0, :4], 1e-5)
    with pytest.raises(ValueError, match="expected epsilon >= 0, got -1"):
        rows.rms_norm(x, x[0], -1.0)
    with pytest.raises(
        ValueError,
        match=r"expected gate of dtype torch\.float32 or torch\.float16 or torch\.bfloat16, got torch\.float64",
    ):
        rows.silu_mul(x.double(), x.double())
