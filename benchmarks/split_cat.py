"""PartialNet in the published words: the network that ours is measured and tested against."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tranche.pconv import PartialBlock, PartialConv, PATChannel, PATSelf


class SplitCat(nn.Module):
    """A spatial mixing in the published words: split, convolve, attend, cat; with the parameters of ours."""

    def __init__(self, ours: PartialConv) -> None:
        super().__init__()
        self.width = ours.dim_conv3
        self.partial_conv3 = ours.partial_conv3
        self.attn, self.norm = getattr(ours, "attn", None), getattr(ours, "norm", None)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x.split([self.width, x.size(1) - self.width], dim=1)
        return torch.cat([self.partial_conv3(first), self.untouched(rest)], dim=1)

    def untouched(self, x: Tensor) -> Tensor:
        return x


class SplitCatChannel(SplitCat):
    def untouched(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2)
        style = torch.stack([pixels.mean(2), pixels.std(2)], dim=-1)[:, :, None]
        return self.norm(x * F.hardsigmoid(self.attn.bn(self.attn.cfc1(style))))


class SplitCatSelf(SplitCat):
    def untouched(self, x: Tensor) -> Tensor:
        return self.attn(self.norm(x))


class SplitCatBlock(nn.Module):
    """The residuals of a block as published."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        mixing = ours.spatial_mixing
        kind = {PATChannel: SplitCatChannel, PATSelf: SplitCatSelf, PartialConv: SplitCat}[type(mixing)]
        self.spatial_mixing, self.mlp, self.drop_path = kind(mixing), ours.mlp, ours.drop_path

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.spatial_mixing, SplitCatSelf):
            x = x + self.spatial_mixing(x)
            return x + self.drop_path(self.mlp(x))
        return x + self.drop_path(self.mlp(self.spatial_mixing(x)))


def split_cat(model: nn.Module) -> nn.Module:
    """A copy of a PartialNet in which torch's split, convolution and cat stand for our ops."""
    swapped = copy.deepcopy(model)
    for path, module in list(swapped.named_modules()):
        if isinstance(module, PartialBlock):
            swapped.set_submodule(path, SplitCatBlock(module))
    return swapped
