"""Partial-channel convolution: some channels are convolved, the others pass through without copies."""

from tranche.pconv import autograd as autograd
from tranche.pconv.modules import PartialConv, replace_partial_convs
from tranche.pconv.ops import conv2d_slice, partial_conv2d, partial_conv2d_

__all__ = ["PartialConv", "conv2d_slice", "partial_conv2d", "partial_conv2d_", "replace_partial_convs"]
