"""Partial-channel convolution: some channels are convolved, the others pass through without copies."""

from tranche.pconv import autograd as autograd
from tranche.pconv.modules import PartialConv, replace_partial_convs
from tranche.pconv.ops import channel_stats, conv2d_slice, partial_conv2d, partial_conv2d_, partial_mlp

__all__ = [
    "PartialConv",
    "channel_stats",
    "conv2d_slice",
    "partial_conv2d",
    "partial_conv2d_",
    "partial_mlp",
    "replace_partial_convs",
]
