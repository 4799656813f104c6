"""Gradients: first and second, against numbers and against torch; and in place, never a wrong one."""

from __future__ import annotations

import pytest
import torch

from tests.pconv.convolutions import make_case, same_bits
from tranche.pconv import conv2d_slice, partial_conv2d, partial_conv2d_, reference

GEOMETRIES = [
    {"bias": True},
    {"start": 3, "width": 3},
    {"groups": 2, "width": 4, "bias": True},
    {"groups": 4, "width": 4, "start": 1},
    {"dilation": 2},
    {"kernel": (1, 5)},
]


def leaves(case):
    return tuple(
        t.detach().clone().requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None
    )


@pytest.mark.parametrize("function", [partial_conv2d, conv2d_slice])
@pytest.mark.parametrize("options", GEOMETRIES)
def test_gradcheck_twice(options, function):
    case = make_case(shape=(2, 6, 5, 4), **({"width": 2} | options), dtype=torch.float64)

    def call(x, weight, bias=None):
        return function(x, weight, bias, **case.options)

    assert torch.autograd.gradcheck(call, leaves(case))
    assert torch.autograd.gradgradcheck(call, leaves(case))


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 4}, {"stride": 2, "groups": 2, "width": 4}])
def test_gradcheck_of_slices(options):
    case = make_case(
        shape=(2, 6, 5, 4), **({"width": 2, "out": 4, "start": 1} | options), dtype=torch.float64
    )

    def call(x, weight):
        return conv2d_slice(x, weight, None, **case.options)

    assert torch.autograd.gradcheck(call, leaves(case))


def test_gradient_of_a_stride_that_keeps_the_size():
    case = make_case(shape=(2, 6, 1, 1), width=2, kernel=(2, 2), padding=1, stride=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: partial_conv2d(x, w, None, **case.options), leaves(case))


@pytest.mark.parametrize("channels_last", [False, True])
def test_same_gradients_as_split_cat(backend, channels_last):
    case = make_case(bias=True, start=5, channels_last=channels_last, device=backend.device)
    gradients = []
    for function in (partial_conv2d, reference.partial_conv2d):
        inputs = leaves(case)
        y = function(*inputs, **case.options)
        upstream = torch.arange(y.numel(), device=y.device).view_as(y).sin()
        gradients.append(torch.autograd.grad((y * upstream).sum(), inputs))
    for ours, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_in_place_under_autograd(backend):
    case = make_case(device=backend.device)
    x = case.x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="do not require grad, got x"):
        partial_conv2d_(x * 1, case.weight, **case.options)
    with pytest.raises(RuntimeError, match="do not require grad, got weight"):
        partial_conv2d_(case.x, case.weight.clone().requires_grad_(), **case.options)
    # what a backward pass has saved must not be overwritten in silence
    saved = case.x.clone()
    y = (saved * x).sum()
    partial_conv2d_(saved, case.weight, **case.options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_in_place_without_grad(backend):
    case = make_case(device=backend.device)
    want = case.run(partial_conv2d)
    with torch.no_grad():
        partial_conv2d_(case.x, case.weight.clone().requires_grad_(), **case.options)
    assert same_bits(case.x, want)
