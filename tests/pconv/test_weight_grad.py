"""conv2d_slice_weight_grad against the reference, in every geometry and layout; its own gradients; bad input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.pconv.convolutions import make_case, same_bits
from tranche.pconv import conv2d_slice, conv2d_slice_weight_grad, partial_mlp, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Gradient:
    """One call."""

    grad_y: Tensor
    x: Tensor
    weight_size: list[int]
    options: dict[str, Any]

    def run(self, function: Any = conv2d_slice_weight_grad) -> Tensor:
        return function(self.grad_y, self.x, self.weight_size, **self.options)

    def to(self, dtype: torch.dtype) -> Gradient:
        return Gradient(self.grad_y.to(dtype), self.x.to(dtype), self.weight_size, self.options)


def make_gradient(seed: int = 0, **options: Any) -> Gradient:
    """The gradient of a case of `make_case`, its upstream laid out as its x."""
    case = make_case(seed, **options)
    y = reference.conv2d_slice(case.x.double(), case.weight.double(), **case.options)
    generator = torch.Generator().manual_seed(seed + 1)
    grad_y = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    if options.get("integers"):
        grad_y = grad_y.round().clamp(-2, 2)
    grad_y = grad_y.to(case.x.dtype).to(case.x.device)
    if options.get("channels_last"):
        grad_y = grad_y.to(memory_format=torch.channels_last)
    return Gradient(grad_y, case.x, list(case.weight.shape), case.options)


def assert_correct(gradient: Gradient, got: Tensor) -> None:
    """As near to the fp64 reference as twice plain torch's error in the same dtype, plus one rounding."""
    name = reference.conv2d_slice_weight_grad
    want, plain = gradient.to(torch.float64).run(name), gradient.run(name)
    assert got.dtype == gradient.x.dtype and list(got.shape) == gradient.weight_size and got.is_contiguous()
    error, yardstick = (got.double() - want).abs().max(), (plain.double() - want).abs().max()
    roundings = 32 if got.dtype == torch.float64 else 4 if got.dtype == torch.float32 else 1
    assert error <= 2 * yardstick + roundings * torch.finfo(got.dtype).eps * want.abs().max(), (
        error,
        yardstick,
    )


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ten": {"width": 10, "start": 3},
    "twelve": {"width": 12, "shape": (1, 36, 6, 6)},
    "twenty": {"width": 20, "start": 1, "shape": (1, 44, 5, 4)},
    "thirty-six": {"width": 36, "shape": (1, 40, 4, 5), "start": 4},
    "one channel": {"width": 1, "start": 5},
    "many outputs": {"width": 5, "out": 75, "shape": (1, 8, 4, 4)},
    "1x1": {"kernel": (1, 1)},
    "7x7": {"kernel": (7, 7)},
    "1x11": {"kernel": (1, 11)},
    "11x1": {"kernel": (11, 1)},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2, "start": 8},
    "odd groups": {"width": 9, "groups": 3, "start": 2},
    "depthwise": {"groups": 8, "start": 4},
    "depthwise 7x7": {"groups": 20, "width": 20, "kernel": (7, 7)},
    "wide depthwise": {"groups": 70, "width": 70, "shape": (1, 72, 4, 4)},
    "depthwise, two outputs": {"groups": 8, "out": 16},
    "one pixel": {"shape": (3, 24, 1, 1)},
    "one row": {"shape": (2, 24, 1, 9)},
    "one column": {"shape": (2, 24, 9, 1)},
    "many images": {"shape": (9, 9, 3, 2)},
    "strided": {"stride": 2, "out": 5},
    "strided rows": {"stride": (3, 1), "out": 18},
    "strided and dilated": {"stride": 3, "dilation": 2, "padding": (1, 4), "out": 17},
    "stride beyond the kernel": {"stride": 4, "kernel": (2, 1), "padding": 0},
    "strided groups": {"stride": 2, "groups": 4, "out": 12, "start": 1},
    "strided depthwise": {"stride": 2, "groups": 8},
    "no padding": {"padding": 0, "out": 3},
    "much padding": {"padding": (5, 12), "start": 7},
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_against_reference(backend, geometry, dtype, channels_last):
    gradient = make_gradient(
        dtype=dtype, channels_last=channels_last, device=backend.device, **GEOMETRIES[geometry]
    )
    assert_correct(gradient, gradient.run())


def test_fp64():
    for geometry in GEOMETRIES.values():
        gradient = make_gradient(dtype=torch.float64, **geometry)
        assert_correct(gradient, gradient.run())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("options", [{}, {"groups": 12}, {"stride": 2, "out": 30}])
def test_many_chunks(backend, options, dtype):
    if backend.name != "cpu" and dtype == torch.float64:
        return
    shape = backend.pick((3, 16, 57, 41), (5, 14, 33, 27))
    gradient = make_gradient(dtype=dtype, shape=shape, width=12, device=backend.device, **options)
    assert_correct(gradient, gradient.run())


def test_integers_are_exact(backend):
    for dtype in FLOATS:
        for options in ({}, {"groups": 8}, {"groups": 2, "stride": 2}):
            gradient = make_gradient(dtype=dtype, integers=True, start=3, device=backend.device, **options)
            want = gradient.to(torch.float64).run(reference.conv2d_slice_weight_grad)
            assert torch.equal(gradient.run().double(), want.to(dtype).double())


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_strides(backend, dtype):
    whole = make_gradient(shape=(2, 24, 9, 14), start=2, dtype=dtype, device=backend.device)
    for view in (
        lambda t: t[:, :, :, ::2],
        lambda t: t.transpose(2, 3),
        lambda t: t[:, :, 1:8, 2:9],
        lambda t: t[:1].expand(3, -1, -1, -1),
    ):
        grad_y, x = view(whole.grad_y), view(whole.x)
        got = Gradient(grad_y, x, whole.weight_size, whole.options)
        assert_correct(got, got.run())
        for layout in (torch.contiguous_format, torch.channels_last):
            dense = Gradient(
                grad_y.contiguous(memory_format=layout), x.contiguous(memory_format=layout),
                whole.weight_size, whole.options,
            )  # fmt: skip
            assert same_bits(dense.run(), got.run())
    wide = torch.cat([whole.x, whole.grad_y, whole.x], dim=1)[:, 24:32]  # a slice of more channels
    assert same_bits(Gradient(wide, whole.x, whole.weight_size, whole.options).run(), whole.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"groups": 72}, {"groups": 2}])
def test_any_number_of_threads(options, dtype):
    gradient = make_gradient(shape=(3, 80, 23, 21), width=72, dtype=dtype, channels_last=True, **options)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4, 16):
            torch.set_num_threads(count)
            results.append(gradient.run())
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("options", [{}, {"groups": 8}])
def test_outputs_do_not_depend_on_one_another(backend, options):
    for dtype in FLOATS:
        gradient = make_gradient(dtype=dtype, device=backend.device, **options)
        all_of_it = gradient.run()
        spoilt = gradient.grad_y.clone()
        spoilt[:, 3] = torch.nan
        got = Gradient(spoilt, gradient.x, gradient.weight_size, gradient.options).run()
        assert torch.isnan(got[3]).all()
        rest = [i for i in range(8) if i != 3]
        assert same_bits(got[rest], all_of_it[rest])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("options", [{}, {"groups": 8}, {"stride": 2}, {"dilation": 2}])
def test_non_finite_values_stay_in_reach(backend, options, channels_last):
    """NaN in x reaches the taps that meet it, however the pixels are paired up."""
    for dtype in FLOATS:
        for width in (6, 7):
            for row, column in ((0, 0), (4, 5), (8, width - 1)):
                gradient = make_gradient(
                    shape=(2, 24, 9, width), dtype=dtype, device=backend.device,
                    channels_last=channels_last, **options,
                )  # fmt: skip
                clean = gradient.run()
                gradient.x[1, 5, row, column] = torch.nan
                gradient.x[0, 20] = torch.nan  # beside the slice
                got = gradient.run()
                mask = gradient.to(torch.float64)
                mask.grad_y, mask.x = torch.ones_like(mask.grad_y), torch.zeros_like(mask.x)
                mask.x[1, 5, row, column] = 1
                reached = mask.run(reference.conv2d_slice_weight_grad) != 0
                assert torch.equal(torch.isnan(got), reached)
                assert same_bits(got[~reached], clean[~reached])


def test_empty(backend):
    for shape, size in (((0, 24, 5, 5), (0, 8, 5, 5)), ((2, 24, 0, 5), (2, 8, 0, 5))):
        x, grad_y = torch.zeros(shape, device=backend.device), torch.zeros(size, device=backend.device)
        got = conv2d_slice_weight_grad(grad_y, x, [8, 8, 1, 3], padding=(0, 1))
        assert torch.equal(got, torch.zeros(8, 8, 1, 3, device=backend.device))


@pytest.mark.parametrize(
    "options", [{}, {"groups": 2}, {"groups": 4}, {"stride": 2, "out": 3}, {"dilation": 2, "padding": 3}]
)
def test_gradcheck_twice(options):
    gradient = make_gradient(shape=(2, 6, 5, 4), width=4, start=1, dtype=torch.float64, **options)

    def call(grad_y, x):
        return Gradient(grad_y, x, gradient.weight_size, gradient.options).run()

    leaves = gradient.grad_y.requires_grad_(), gradient.x.requires_grad_()
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_backward_calls_it(backend):
    """The convolutions' gradients are this op's bits."""
    gradient = make_gradient(start=3, device=backend.device)
    weight = torch.zeros(gradient.weight_size, device=backend.device, requires_grad=True)
    conv2d_slice(gradient.x, weight, **gradient.options).backward(gradient.grad_y)
    assert same_bits(weight.grad, gradient.run())

    x, layers = gradient.x, (torch.eye(24), torch.zeros(24), torch.eye(24), torch.zeros(24))
    layers = tuple(t.to(backend.device) for t in layers)
    conv_weight = torch.randn(6, 6, 3, 3, device=backend.device, requires_grad=True)
    y = partial_mlp(x, conv_weight, *layers, residual=False)
    upstream = torch.randn(y.shape, device=backend.device)
    y.backward(upstream)
    masked = (upstream * (y > 0))[:, :6]
    torch.testing.assert_close(
        conv_weight.grad, conv2d_slice_weight_grad(masked, x, [6, 6, 3, 3], padding=1), rtol=1e-5, atol=1e-5
    )


def test_opcheck(backend):
    for options in ({}, {"channels_last": True, "start": 2}, {"groups": 8}, {"stride": 2}):
        case = make_gradient(shape=(1, 12, 3, 4), device=backend.device, **options)
        op = backend.ops().conv2d_slice_weight_grad.default
        stride = [options.get("stride", 1)] * 2
        rest = (case.weight_size, stride, [1, 1], [1, 1], options.get("groups", 1), options.get("start", 0))
        torch.library.opcheck(op, (case.grad_y, case.x, *rest))
        leaves = (t.clone().requires_grad_() for t in (case.grad_y, case.x))
        torch.library.opcheck(op, (*leaves, *rest))


def test_compile(backend):
    gradient = make_gradient(start=3, device=backend.device)
    compiled = torch.compile(conv2d_slice_weight_grad, backend="aot_eager", fullgraph=True)
    assert same_bits(gradient.run(compiled), gradient.run())

    def step(x, weight):
        return conv2d_slice(x, weight, padding=1, start=3).square().sum()

    weights = [torch.randn(gradient.weight_size).to(backend.device).requires_grad_()]
    weights.append(weights[0].detach().clone().requires_grad_())
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for function, weight in zip((step, compiled), weights, strict=True):
        function(gradient.x, weight).backward()
    assert same_bits(weights[0].grad, weights[1].grad)


def test_flops():
    gradient = make_gradient(shape=(2, 24, 9, 7), width=6, out=5, start=2)
    with FlopCounterMode(display=False) as counter:
        gradient.run()
    assert counter.get_total_flops() == 2 * (2 * 9 * 7) * (5 * 6 * 3 * 3)


X, Y, W = (2, 12, 5, 5), (2, 4, 5, 5), (4, 4, 3, 3)
BAD: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "x of shape": (Y, (12, 5, 5), W, {}),
    "grad_y of shape": ((4, 5, 5), X, W, {}),
    "weight_size of 4": (Y, X, (4, 4, 3), {}),
    "weight_size of 4 integers >= 1": (Y, X, (4, 0, 3, 3), {}),
    r"grad_y.size\(0\)": ((1, 4, 5, 5), X, W, {}),
    r"grad_y.size\(1\)": ((2, 5, 5, 5), X, W, {}),
    r"grad_y.size\(2\)": ((2, 4, 4, 5), X, W, {}),
    r"grad_y.size\(3\)": ((2, 4, 5, 4), X, W, {}),
    "start in": (Y, X, W, {"start": 9}),
    "groups >= 1": (Y, X, W, {"groups": 3}),
    r"groups \* weight_size\[1\] below": (
        (1, 2**20, 1, 1),
        (1, 4, 1, 1),
        (2**20, 2**12, 1, 1),
        {"groups": 2**20},
    ),
    "stride of 2": (Y, X, W, {"stride": 0}),
    "padding of 2": (Y, X, W, {"padding": -1}),
    "dilation of 2": (Y, X, W, {"dilation": (1, 1, 1)}),
    "reach": (Y, X, W, {"dilation": 4}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(backend, message):
    y_shape, x_shape, size, options = BAD[message]
    grad_y, x = (torch.zeros(s, device=backend.device) for s in (y_shape, x_shape))
    with pytest.raises(ValueError, match=message):
        conv2d_slice_weight_grad(grad_y, x, size, **({"padding": 1} | options))


def test_bad_types(backend):
    grad_y, x = torch.zeros(Y, device=backend.device), torch.zeros(X, device=backend.device)
    with pytest.raises(ValueError, match=r"grad_y of dtype torch\.float32"):
        conv2d_slice_weight_grad(grad_y.half(), x, W, padding=1)
    with pytest.raises(ValueError, match="x of dtype"):
        conv2d_slice_weight_grad(grad_y.int(), x.int(), W, padding=1)
