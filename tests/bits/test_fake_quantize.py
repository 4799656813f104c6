"""Fake quantization: the values of the integer ops, and the gradients of the published formulas."""

from __future__ import annotations

import pytest
import torch

from tranche import _library, bits
from tranche.bits import reference

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def grid_points(rows, inputs, dtype, device):
    """Weights inside and outside both clips, and ties of both roundings, at scales of powers of two and others."""
    w = 40 * torch.randn(rows, inputs, dtype=torch.float64)
    w.view(-1)[: rows * inputs // 3] = torch.randint(-300, 300, (rows * inputs // 3,)) / 2.0
    scale = torch.where(torch.arange(rows) % 2 == 0, 1.0, 0.7 + torch.rand(rows))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return w.to(dtype).to(device), scale.to(wide).to(device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", range(2, 9))
def test_weights_equal_the_reference(backend, dtype, width):
    for rows, inputs in ((1, 1), (5, 70), backend.pick((17, 300), (3, 300))):
        w, scale = grid_points(rows, inputs, dtype, backend.device)
        assert torch.equal(bits.fake_quantize(w, scale, width), reference.fake_quantize(w, scale, width))
        if width < 8:
            got = bits.fake_quantize(w, scale, width, stored_bits=width + 1)
            assert torch.equal(got, reference.fake_quantize(w, scale, width, stored_bits=width + 1))


@pytest.mark.parametrize("width", [2, 4, 8])
def test_weights_are_those_of_the_integer_ops(backend, width):
    w = torch.randn(20, 64, device=backend.device)
    for group_size in (None, 32):
        codes, scale = bits.quantize(w, group_size=group_size)
        scale = scale * 0.6  # so that the stored clip holds some
        codes, _ = bits.quantize(w, scale=scale, group_size=group_size)
        want = bits.dequantize(bits.pack(codes), scale, width)
        assert torch.equal(bits.fake_quantize(w, scale, width), want)


def gradients(function, *inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    (
        out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    ).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_gradients_of_weights(backend, dtype, width):
    w, scale = grid_points(4, backend.pick(700, 300), dtype, backend.device)
    got = gradients(lambda *a: bits.fake_quantize(*a, width), w, scale)
    want = gradients(lambda *a: reference.fake_quantize(*a, width), w, scale)
    # the reference multiplies by the scale and divides by it again
    torch.testing.assert_close(got[0], want[0], rtol=4 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(got[1], want[1], rtol=1e-10 if dtype == torch.float64 else 1e-4, atol=1e-2)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_gradients_of_weights_are_the_formulas(backend, width):
    """Inside: 1 and 2^D W_l - W/s. Outside: 0 and 2^D times the bound."""
    step, half_step = 2 ** (8 - width), 2 ** (8 - width) / 2 if width < 8 else 0
    low, high = -128.0, 127.0
    last_inside = (2 ** (width - 1) - 1) * step + half_step - 1 if width < 8 else 127  # of codes
    for code, inside in (
        (low - 2, False),
        (low, True),
        (-3.0, True),
        (5.0, True),
        (last_inside, True),
        (high + 3, False),
    ):
        w = torch.tensor([[code * 0.25]], dtype=torch.float64, device=backend.device, requires_grad=True)
        scale = torch.tensor([0.25], dtype=torch.float64, device=backend.device, requires_grad=True)
        out = bits.fake_quantize(w, scale, width)
        out.backward(torch.full_like(out, 3.0))
        stored = int(min(max(round(code), -128), 127))
        rounded = step * int(reference.round_bits(torch.tensor([stored], dtype=torch.int8), width))
        assert out.item() == rounded * 0.25
        assert w.grad.item() == (3.0 if inside else 0.0)
        assert scale.grad.item() == 3.0 * (rounded - code if inside else rounded)
        if not inside:
            assert rounded == step * (-(2 ** (width - 1)) if code < 0 else 2 ** (width - 1) - 1)


def test_the_second_clip_stops_gradients(backend):
    # at 2 bits codes from 96 on round to 2, which is clipped to 1
    w = torch.tensor([[95.0, 96.0]], device=backend.device, requires_grad=True)
    scale = torch.ones(1, device=backend.device, requires_grad=True)
    bits.fake_quantize(w, scale, 2).sum().backward()
    assert w.grad.tolist() == [[1.0, 0.0]]
    assert scale.grad.item() == (64 - 95) + 64


def test_groups_and_shapes(backend):
    w, _ = grid_points(3, 64, torch.float32, backend.device)
    scale = 0.5 + torch.rand(3, 2, device=backend.device)
    got = gradients(lambda *a: bits.fake_quantize(*a, 4), w, scale)
    want = gradients(lambda *a: reference.fake_quantize(*a, 4), w, scale)
    assert torch.allclose(got[0], want[0], rtol=1e-6, atol=0)
    assert torch.allclose(got[1], want[1], rtol=1e-4, atol=1e-2)
    kernel = w.view(3, 4, 4, 4)
    assert torch.equal(
        bits.fake_quantize(kernel, scale[:, 0], 4).view(3, 64),
        bits.fake_quantize(w, scale[:, 0].contiguous(), 4),
    )
    for shape in ((0, 4), (4, 0)):
        empty = torch.empty(shape, device=backend.device, requires_grad=True)
        ones = torch.ones(shape[0], device=backend.device, requires_grad=True)
        bits.fake_quantize(empty, ones, 4).sum().backward()
        assert empty.grad.shape == shape and not ones.grad.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_zero", [False, True])
def test_activations(backend, dtype, with_zero):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for count in (1, 63, backend.pick(20000, 9000)):
        x = (3 * torch.randn(count)).to(dtype).to(backend.device)
        scale = torch.tensor(0.4, dtype=wide, device=backend.device)
        inputs = (
            (x, scale, torch.tensor(-0.7, dtype=wide, device=backend.device)) if with_zero else (x, scale)
        )
        for width in backend.pick((1, 2, 4, 8), (2, 8)):
            ours = lambda x, s, z=None, b=width: bits.fake_quantize_activations(x, s, b, z)  # noqa: E731
            plain = lambda x, s, z=None, b=width: reference.fake_quantize_activations(x, s, b, z)  # noqa: E731
            assert torch.equal(ours(*inputs), plain(*inputs))
            got, want = gradients(ours, *inputs), gradients(plain, *inputs)
            torch.testing.assert_close(got[0], want[0], rtol=4 * torch.finfo(dtype).eps, atol=0)
            for a, b in zip(got[1:], want[1:], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9 if wide == torch.float64 else 1e-3, atol=2e-2)


def test_gradients_of_activations_are_the_formulas(backend):
    scale = torch.tensor(0.5, dtype=torch.float64, device=backend.device, requires_grad=True)
    zero = torch.tensor(-1.0, dtype=torch.float64, device=backend.device, requires_grad=True)
    for value, q, inside in (
        (-3.0, 0, False),
        (-1.0, 0, True),
        (-0.2, 2, True),
        (0.45, 3, True),
        (2.0, 3, False),
    ):
        x = torch.tensor([value], dtype=torch.float64, device=backend.device, requires_grad=True)
        scale.grad = zero.grad = None
        out = bits.fake_quantize_activations(x, scale, 2, zero)
        out.backward()
        assert out.item() == q * 0.5 - 1
        assert x.grad.item() == float(inside) and zero.grad.item() == float(not inside)
        assert abs(scale.grad.item() - (q - (value + 1) / 0.5 if inside else q)) < 1e-12


def test_the_sums_of_gradients_are_the_same_every_time(backend):
    w, scale = grid_points(6, backend.pick(5000, 600), torch.float32, backend.device)
    one = gradients(lambda *a: bits.fake_quantize(*a, 4), w, scale)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(one[1], gradients(lambda *a: bits.fake_quantize(*a, 4), w, scale)[1])
    finally:
        torch.set_num_threads(threads)


def test_not_a_number_stays_and_infinity_is_clipped(backend):
    w = torch.tensor([[torch.nan, torch.inf, -torch.inf]], device=backend.device)
    got = bits.fake_quantize(w, torch.ones(1, device=backend.device), 4)
    assert got[0, 0].isnan() and got[0, 1:].tolist() == [112.0, -128.0]
    got = bits.fake_quantize_activations(w[0], torch.ones((), device=backend.device), 2)
    assert got[0].isnan() and got[1:].tolist() == [3.0, 0.0]


def test_refused(backend):
    w, scale = torch.ones(3, 4, device=backend.device), torch.ones(3, device=backend.device)
    for call, match in (
        (lambda: bits.fake_quantize(w, scale, 1), r"expected bits in 2 to stored_bits \(8\), got 1"),
        (lambda: bits.fake_quantize(w, scale, 5, 4), r"expected bits in 2 to stored_bits \(4\), got 5"),
        (lambda: bits.fake_quantize(w, scale, 4, 9), "expected stored_bits in 2 to 8, got 9"),
        (
            lambda: bits.fake_quantize(w, scale[:2], 4),
            r"expected scale.size\(0\) == w.size\(0\) \(3\), got 2",
        ),
        (
            lambda: bits.fake_quantize(w, scale.double(), 4),
            "expected scale of dtype torch.float32, got torch.float64",
        ),
        (lambda: bits.fake_quantize(w.int(), scale, 4), "expected w of dtype"),
        (lambda: bits.fake_quantize(w, torch.ones(3, 3), 4), r"expected scale.size\(1\) that divides"),
        (lambda: bits.fake_quantize_activations(w, scale, 4), "expected scale of one element"),
        (lambda: bits.fake_quantize_activations(w, scale[0], 9), "expected bits in 1 to 8, got 9"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_registered_as_torch_wants_it(backend):
    ops = _library.ops()
    w, scale = grid_points(2, 40, torch.float32, backend.device)
    one = scale[:1]
    for op, arguments in (
        (ops.bits_fake_quantize, (w, scale, 4, 8)),
        (ops.bits_fake_quantize_backward, (w, w, scale, 4, 8)),
        (ops.bits_fake_quantize_activations, (w, one, None, 4)),
        (ops.bits_fake_quantize_activations_backward, (w, w, one, one, 4)),
    ):
        torch.library.opcheck(op.default, arguments)
