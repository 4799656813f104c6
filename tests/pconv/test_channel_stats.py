"""channel_stats against the reference, in every layout, and its gradients."""

from __future__ import annotations

import pytest
import torch

from tests.pconv.convolutions import same_bits
from tranche.pconv import channel_stats, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.float32, device="cpu"):
    return (torch.randn(*shape) * 3 + 2).to(dtype).to(device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 24, 9, 7), (1, 37, 1, 2), (3, 5, 1, 40), (1, 3, 20, 15)])
@pytest.mark.parametrize("start", [0, 2])
def test_against_reference(backend, shape, dtype, start):
    x = draw(*shape, dtype=dtype, device=backend.device)
    got = channel_stats(x, start)
    want, plain = reference.channel_stats(x.double(), start), reference.channel_stats(x, start)
    for ours, exact, torchs in zip(got, want, plain, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        error, yardstick = (ours.double() - exact).abs().max(), (torchs.double() - exact).abs().max()
        roundings = 4 if dtype == torch.float32 else 1
        assert error <= 2 * yardstick + roundings * torch.finfo(dtype).eps * exact.abs().max()


def test_fp64():
    x = draw(2, 20, 17, 19, dtype=torch.float64)
    torch.testing.assert_close(channel_stats(x, 3), reference.channel_stats(x, 3))


def test_no_cancellation(backend):
    x = draw(1, 4, 20, 20, device=backend.device) + 4096
    mean, std = channel_stats(x, 0)
    want_mean, want_std = reference.channel_stats(x.double(), 0)
    torch.testing.assert_close(mean.double(), want_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(std.double(), want_std, rtol=1e-4, atol=0)


def test_same_bits_in_every_layout(backend):
    x = draw(3, 24, 21, 17, device=backend.device)
    want = channel_stats(x, 5)
    views = (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x, x], dim=3)[..., :17],
    )
    for view in views:
        assert all(same_bits(a, b) for a, b in zip(channel_stats(view, 5), want, strict=True))
    assert all(same_bits(a, b[1:2]) for a, b in zip(channel_stats(x[1:2], 5), want, strict=True))
    assert all(same_bits(a, b[:, 4:]) for a, b in zip(channel_stats(x, 9), want, strict=True))


def test_edges(backend):
    one = channel_stats(draw(2, 6, 1, 1, device=backend.device), 1)
    assert torch.isfinite(one[0]).all() and torch.isnan(one[1]).all()
    assert channel_stats(draw(2, 6, 3, 3, device=backend.device), 6)[0].shape == (2, 0)
    assert channel_stats(draw(0, 6, 3, 3, device=backend.device), 2)[1].shape == (0, 4)
    none = channel_stats(draw(2, 6, 0, 3, device=backend.device), 2)
    assert torch.isnan(none[0]).all() and torch.isnan(none[1]).all()
    x = draw(2, 6, 5, 5, device=backend.device)
    clean = channel_stats(x, 0)
    x[1, 3, 2, 2] = torch.nan
    for got, before in zip(channel_stats(x, 0), clean, strict=True):
        assert torch.isnan(got[1, 3]) and torch.isnan(got).sum() == 1
        assert same_bits(got[0], before[0])


def test_gradcheck_twice():
    x = draw(2, 4, 3, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: channel_stats(x, 1), x)
    assert torch.autograd.gradgradcheck(lambda x: channel_stats(x, 1), x)


def test_same_gradients_as_reference(backend):
    gradients = []
    for function in (channel_stats, reference.channel_stats):
        torch.manual_seed(1)
        x = draw(2, 6, 4, 5, device=backend.device)
        x[0, 5] = 1.0  # constant: no deviation, and no gradient of it
        x.requires_grad_()
        mean, std = function(x, 2)
        gradients.append(torch.autograd.grad((mean.sin() + std.cos() + std).sum(), x)[0])
    torch.testing.assert_close(*gradients)


def test_opcheck_and_compile(backend):
    x = draw(1, 6, 3, 4, device=backend.device)
    op = backend.ops().channel_stats.default
    torch.library.opcheck(op, (x, 2))
    torch.library.opcheck(op, (x.clone().requires_grad_(), 2))
    compiled = torch.compile(channel_stats, backend="aot_eager", fullgraph=True)
    assert all(same_bits(a, b) for a, b in zip(compiled(x, 2), channel_stats(x, 2), strict=True))


def test_bad_arguments(backend):
    x = draw(1, 6, 3, 4, device=backend.device)
    with pytest.raises(ValueError, match="start in"):
        channel_stats(x, 7)
    with pytest.raises(ValueError, match="start in"):
        channel_stats(x, -1)
    with pytest.raises(ValueError, match="x of shape"):
        channel_stats(x[0], 1)
    with pytest.raises(ValueError, match="x of dtype"):
        channel_stats(x.int(), 1)
