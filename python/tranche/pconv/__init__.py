"""Partial-channel convolution: some channels are convolved, the others pass through without copies."""

import importlib
import sys

from tranche.pconv import autograd as autograd
from tranche.pconv import flops as flops
from tranche.pconv.attention import PATChannel, PATSelf, PATSpatial
from tranche.pconv.dynamic import DPConv, freeze, order_loss, resource_at, resource_penalty
from tranche.pconv.export import export_onnx
from tranche.pconv.fold import fold
from tranche.pconv.modules import PartialConv, replace_partial_convs
from tranche.pconv.ops import (
    channel_gate,
    channel_stats,
    conv2d_pack,
    conv2d_slice,
    conv2d_slice_weight_grad,
    partial_attention,
    partial_conv2d,
    partial_conv2d_,
    partial_mlp,
    partial_mlp_pack,
)
from tranche.pconv.partialnet import (
    PartialBlock,
    PartialNet,
    partialnet_l,
    partialnet_m,
    partialnet_s,
    partialnet_t0,
    partialnet_t1,
    partialnet_t2,
)

__all__ = [
    "DPConv",
    "PATChannel",
    "PATSelf",
    "PATSpatial",
    "PartialBlock",
    "PartialConv",
    "PartialNet",
    "channel_gate",
    "channel_stats",
    "conv2d_pack",
    "conv2d_slice",
    "conv2d_slice_weight_grad",
    "export_onnx",
    "fold",
    "freeze",
    "order_loss",
    "partial_attention",
    "partial_conv2d",
    "partial_conv2d_",
    "partial_mlp",
    "partial_mlp_pack",
    "partialnet_l",
    "partialnet_m",
    "partialnet_s",
    "partialnet_t0",
    "partialnet_t1",
    "partialnet_t2",
    "replace_partial_convs",
    "resource_at",
    "resource_penalty",
]

if "timm" in sys.modules:
    importlib.import_module("tranche.pconv.timm")
