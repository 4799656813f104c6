"""Bad arguments of the convolutions are refused by name, before memory is touched."""

from __future__ import annotations

import pytest
import torch

from tranche.pconv import conv2d_slice, partial_conv2d, partial_conv2d_

X, W = (2, 12, 5, 5), (4, 4, 3, 3)
BAD = {
    "x of shape": ((12, 5, 5), W, {}),
    "weight of shape": (X, (4, 4, 3), {}),
    "start in": (X, W, {"start": 9}),
    "start in ": (X, W, {"start": -1}),
    "groups >= 1": (X, W, {"groups": 3}),
    "groups >= 1 ": (X, W, {"groups": 0}),
    "stride of two": (X, W, {"stride": 0}),
    "padding of two": (X, W, {"padding": -1}),
    "dilation of two": (X, W, {"dilation": (1, 1, 1)}),
    "weight with elements": (X, (0, 4, 3, 3), {}),
}


@pytest.mark.parametrize("function", [partial_conv2d, partial_conv2d_, conv2d_slice])
@pytest.mark.parametrize("message", BAD)
def test_bad_numbers(backend, message, function):
    shape, weight_shape, options = BAD[message]
    x, weight = (torch.zeros(s, device=backend.device) for s in (shape, weight_shape))
    with pytest.raises(ValueError, match=message.strip()):
        function(x, weight, **({"padding": 1} | options))


def test_bad_types_and_bias(backend):
    x, weight = torch.zeros(X, device=backend.device), torch.zeros(W, device=backend.device)
    with pytest.raises(ValueError, match=r"weight of dtype torch\.float32"):
        partial_conv2d(x, weight.bfloat16(), padding=1)
    with pytest.raises(ValueError, match="x of dtype"):
        partial_conv2d(x.int(), weight.int(), padding=1)
    with pytest.raises(ValueError, match="bias of shape"):
        partial_conv2d(x, weight, torch.zeros(5, device=backend.device), padding=1)


@pytest.mark.parametrize("function", [partial_conv2d, partial_conv2d_])
def test_size_must_stay(backend, function):
    x, weight = torch.zeros(X, device=backend.device), torch.zeros(W, device=backend.device)
    with pytest.raises(ValueError, match=r"height of the output == x.size\(2\)"):
        function(x, weight)
    with pytest.raises(ValueError, match=r"height of the output == x.size\(2\)"):
        function(x, weight, padding=1, stride=2)
    with pytest.raises(ValueError, match="keeps its channels"):
        function(x, weight[:2], padding=1)
    with pytest.raises(ValueError, match="reach"):
        conv2d_slice(x, weight, dilation=3)


def test_in_place_on_overlapping_memory(backend):
    weight = torch.ones(4, 4, 3, 3, device=backend.device)
    windows = torch.zeros(100, device=backend.device).as_strided((1, 4, 5, 5), (0, 5, 3, 1))
    row = torch.zeros(1, 12, 5, 5, device=backend.device)
    with pytest.raises(ValueError, match="do not share memory"):
        partial_conv2d_(row.expand(2, -1, -1, -1), weight, padding=1)
    with pytest.raises(ValueError, match="do not share memory"):
        partial_conv2d_(windows, weight, padding=1)
    whole = torch.zeros(2, 8, 3, 3, device=backend.device)
    with pytest.raises(ValueError, match="weight outside the memory of x"):
        partial_conv2d_(whole, whole[:1, :4].expand(4, -1, -1, -1), padding=1)
