"""Gradients of the family, composed of its own ops and torch's, so that they have gradients themselves.

The gradient of a partial convolution with respect to x is a partial convolution: the same kernel with the weight's
taps reversed and its channels exchanged, the other channels passing through. The gradient of the weight is torch's
(training passes may use torch's matmuls).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tranche import _library


def _rotated(weight: Tensor, groups: int) -> Tensor:
    """[c_out, c / groups, kh, kw] with taps reversed and, per group, in and out exchanged."""
    c_out, group_in, kh, kw = weight.shape
    grouped = weight.view(groups, c_out // groups, group_in, kh, kw).transpose(1, 2).flip(3, 4)
    return grouped.reshape(groups * group_in, c_out // groups, kh, kw)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *geometry, groups, start = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None
    ctx.geometry, ctx.groups, ctx.start = geometry, groups, start


def _weight_and_bias(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias from that of the convolved slice."""
    x, weight = ctx.saved_tensors
    needs_weight, needs_bias = ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]
    grad_weight = None
    if needs_weight:
        part = x.narrow(1, ctx.start, ctx.groups * weight.size(1))
        _, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, part, weight, None, *ctx.geometry, False, [0, 0], ctx.groups, [False, True, False]
        )
    return grad_weight, grad.sum((0, 2, 3)) if needs_bias else None


def _reversed_padding(ctx: Any, weight: Tensor) -> list[int]:
    _, padding, dilation = ctx.geometry
    return [dilation[i] * (weight.size(2 + i) - 1) - padding[i] for i in range(2)]


def _input(ctx: Any, grad: Tensor) -> Tensor:
    """torch's gradient of the slice of x, for what is a transposed convolution and no convolution."""
    x, weight = ctx.saved_tensors
    part = x.narrow(1, ctx.start, ctx.groups * weight.size(1))
    grad_part, _, _ = torch.ops.aten.convolution_backward(
        grad, part, weight, None, *ctx.geometry, False, [0, 0], ctx.groups, [True, False, False]
    )
    return grad_part


def _register_partial_conv2d(namespace: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _, weight = ctx.saved_tensors
        stop = ctx.start + weight.size(0)
        part = grad[:, ctx.start : stop]
        grad_x = None
        if ctx.needs_input_grad[0]:
            stride, _, dilation = ctx.geometry
            # a stride that keeps the size is possible: on images of one row and column
            if list(stride) == [1, 1]:
                op = getattr(torch.ops, namespace).partial_conv2d
                turned, padding = _rotated(weight, ctx.groups), _reversed_padding(ctx, weight)
                grad_x = op(grad, turned, None, stride, padding, dilation, ctx.groups, ctx.start)
            else:
                grad_x = torch.cat([grad[:, : ctx.start], _input(ctx, part), grad[:, stop:]], dim=1)
        return grad_x, *_weight_and_bias(ctx, part), None, None, None, None, None

    torch.library.register_autograd(f"{namespace}::partial_conv2d", backward, setup_context=_save)


def _register_conv2d_slice(namespace: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            stride, _, dilation = ctx.geometry
            turned_padding = _reversed_padding(ctx, weight)
            width = ctx.groups * weight.size(1)
            # With stride 1 the rotated kernel serves; the rest is a transposed convolution.
            if list(stride) == [1, 1] and min(turned_padding) >= 0:
                op = getattr(torch.ops, namespace).conv2d_slice
                turned = _rotated(weight, ctx.groups)
                part = op(grad, turned, None, stride, turned_padding, dilation, ctx.groups, 0)
            else:
                part = _input(ctx, grad)
            grad_x = F.pad(part, (0, 0, 0, 0, ctx.start, x.size(1) - ctx.start - width))
        return grad_x, *_weight_and_bias(ctx, grad), None, None, None, None, None

    torch.library.register_autograd(f"{namespace}::conv2d_slice", backward, setup_context=_save)


for _namespace in _library.NAMESPACES:
    _register_partial_conv2d(_namespace)
    _register_conv2d_slice(_namespace)
