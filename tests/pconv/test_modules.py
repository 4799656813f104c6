"""PartialConv has the published keys and attributes, and takes the place of split-cat modules."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tranche.pconv import PartialConv, replace_partial_convs


class SplitCat(nn.Module):
    """What FasterNet and timm have: the same attributes, split and cat."""

    def __init__(self, dim, n_div=4):
        super().__init__()
        self.dim_conv3 = dim // n_div
        self.dim_untouched = dim - self.dim_conv3
        self.partial_conv3 = nn.Conv2d(self.dim_conv3, self.dim_conv3, 3, 1, 1, bias=False)

    def forward(self, x):
        first, rest = torch.split(x, [self.dim_conv3, self.dim_untouched], dim=1)
        return torch.cat((self.partial_conv3(first), rest), 1)


def test_published_keys_and_attributes(backend):
    module = PartialConv(40).to(backend.device)
    assert (module.dim_conv3, module.dim_untouched) == (10, 30)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "partial_conv3.weight": (10, 10, 3, 3)
    }
    theirs = SplitCat(40).to(backend.device)
    module.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 40, 6, 5, device=backend.device)
    torch.testing.assert_close(module(x), theirs(x))


def test_replacing(backend):
    model = nn.Sequential(nn.Conv2d(3, 16, 1), SplitCat(16), nn.ModuleList([SplitCat(16, 2)])[0]).to(
        backend.device
    )
    x = torch.randn(2, 3, 6, 5, device=backend.device)
    want, parameters, keys = model(x), list(model.parameters()), list(model.state_dict())
    want.square().sum().backward()
    gradients = [p.grad.clone() for p in parameters]
    model.zero_grad()
    assert replace_partial_convs(model) == 2
    assert [type(m) for m in model[1:]] == [PartialConv, PartialConv]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    got = model(x)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    for p, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-4)
    assert replace_partial_convs(model) == 0


def test_what_is_not_a_partial_convolution_stays():
    odd = SplitCat(16)
    odd.partial_conv3 = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    named = SplitCat(16)
    named.partial_conv3.padding = "same"
    attending = SplitCat(16)
    attending.attn, attending.norm = nn.Identity(), nn.BatchNorm2d(12)
    assert replace_partial_convs(nn.Sequential(odd, named, attending, nn.Conv2d(4, 4, 3))) == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="n_div in"):
        PartialConv(4, n_div=5)
    with pytest.raises(ValueError, match="odd kernel_size"):
        PartialConv(8, kernel_size=2)
    conv = PartialConv(64)
    for channels in (8, 32, 128):
        message = f"expected x of 64 channels, got {channels}. Make it with dim={channels}."
        with pytest.raises(ValueError, match=re.escape(f"tranche.PartialConv: {message}")):
            conv(torch.zeros(1, channels, 4, 4))
