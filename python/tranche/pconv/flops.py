"""What the family's ops cost, told to torch's `FlopCounterMode`: two operations for each multiply-add."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from tranche import _library


def _conv2d_slice(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, _, height, width = out_shape
    return 2 * batch * height * width * math.prod(weight)


def _weight_grad(
    grad_y: Any, x: Any, weight_size: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    batch, _, height, width = grad_y
    return 2 * batch * height * width * math.prod(weight_size)


def _partial_mlp(
    x: Any, conv_weight: Any, w1: Any, b1: Any, w2: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    batch, _, height, width = x
    return 2 * batch * height * width * (math.prod(conv_weight) + math.prod(w1) + math.prod(w2))


def _channel_gate(x: Any, start: int, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * x[0] * math.prod(weight)


def _partial_attention(
    x: Any, start: int, qkv_weight: Any, qkv_bias: Any, proj_weight: Any, *args: Any, **kwargs: Any
) -> int:
    batch, channels, height, width = x
    pixels = height * width
    linear = math.prod(qkv_weight) + math.prod(proj_weight)
    return 2 * batch * pixels * (linear + 2 * pixels * (channels - start))


for _namespace in _library.NAMESPACES:
    _ops = getattr(torch.ops, _namespace)
    register_flop_formula([_ops.partial_conv2d, _ops.conv2d_slice])(_conv2d_slice)
    register_flop_formula(_ops.conv2d_slice_weight_grad)(_weight_grad)
    register_flop_formula(_ops.partial_mlp)(_partial_mlp)
    register_flop_formula(_ops.channel_gate)(_channel_gate)
    register_flop_formula(_ops.partial_attention)(_partial_attention)
