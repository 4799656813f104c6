"""Gradients of the family, composed of its own ops and torch's, so that they have gradients themselves.

The gradient of a partial convolution with respect to x is a partial convolution: the same kernel with the weight's
taps reversed and its channels exchanged, the other channels passing through. The gradient of the weight is an op of
its own, linear in both its tensors: its gradients are a convolution and a transposed one.
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
    x, weight, bias, stride, padding, dilation, groups, start, *_ = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None
    ctx.geometry, ctx.groups, ctx.start = [stride, padding, dilation], groups, start


def _weight_and_bias(namespace: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias from that of the convolved slice."""
    x, weight = ctx.saved_tensors
    needs_weight, needs_bias = ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]
    grad_weight = None
    if needs_weight:
        op = getattr(torch.ops, namespace).conv2d_slice_weight_grad
        grad_weight = op(grad, x, weight.shape, *ctx.geometry, ctx.groups, ctx.start)
    return grad_weight, grad.sum((0, 2, 3)) if needs_bias else None


def _reversed_padding(geometry: list[Any], weight: Tensor) -> list[int]:
    _, padding, dilation = geometry
    return [dilation[i] * (weight.size(2 + i) - 1) - padding[i] for i in range(2)]


def _transposed(grad: Tensor, part: Tensor, weight: Tensor, geometry: list[Any], groups: int) -> Tensor:
    """torch's gradient of the convolved channels of x, for what is a transposed convolution and no convolution."""
    grad_part, _, _ = torch.ops.aten.convolution_backward(
        grad, part, weight, None, *geometry, False, [0, 0], groups, [True, False, False]
    )
    return grad_part


def _slice_input(
    namespace: str, grad: Tensor, x: Tensor, weight: Tensor, geometry: list[Any], groups: int, start: int
) -> Tensor:
    """The gradient of x, of which conv2d_slice has taken a slice."""
    stride, _, dilation = geometry
    padding, width = _reversed_padding(geometry, weight), groups * weight.size(1)
    # With stride 1 the rotated kernel serves; the rest is a transposed convolution.
    if list(stride) == [1, 1] and min(padding) >= 0:
        op = getattr(torch.ops, namespace).conv2d_slice
        part = op(grad, _rotated(weight, groups), None, stride, padding, dilation, groups, 0)
    else:
        part = _transposed(grad, x.narrow(1, start, width), weight, geometry, groups)
    return F.pad(part, (0, 0, 0, 0, start, x.size(1) - start - width))


def _register_partial_conv2d(namespace: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        stop = ctx.start + weight.size(0)
        part = grad[:, ctx.start : stop]
        grad_x = None
        if ctx.needs_input_grad[0]:
            stride, _, dilation = ctx.geometry
            # a stride that keeps the size is possible: on images of one row and column
            if list(stride) == [1, 1]:
                op = getattr(torch.ops, namespace).partial_conv2d
                turned, padding = _rotated(weight, ctx.groups), _reversed_padding(ctx.geometry, weight)
                grad_x = op(grad, turned, None, stride, padding, dilation, ctx.groups, ctx.start)
            else:
                turned = _transposed(part, x[:, ctx.start : stop], weight, ctx.geometry, ctx.groups)
                grad_x = torch.cat([grad[:, : ctx.start], turned, grad[:, stop:]], dim=1)
        return grad_x, *_weight_and_bias(namespace, ctx, part), None, None, None, None, None, None

    torch.library.register_autograd(f"{namespace}::partial_conv2d", backward, setup_context=_save)


def _register_conv2d_slice(namespace: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _slice_input(namespace, grad, x, weight, ctx.geometry, ctx.groups, ctx.start)
        return grad_x, *_weight_and_bias(namespace, ctx, grad), None, None, None, None, None, None

    torch.library.register_autograd(f"{namespace}::conv2d_slice", backward, setup_context=_save)


def _save_weight_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_y, x, _, *ctx.geometry, ctx.groups, ctx.start = inputs
    ctx.save_for_backward(grad_y, x)


def _register_weight_grad(namespace: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_y, x = ctx.saved_tensors
        grad_grad_y = grad_x = None
        if ctx.needs_input_grad[0]:
            op = getattr(torch.ops, namespace).conv2d_slice
            grad_grad_y = op(x, grad, None, *ctx.geometry, ctx.groups, ctx.start)
        if ctx.needs_input_grad[1]:
            grad_x = _slice_input(namespace, grad_y, x, grad, ctx.geometry, ctx.groups, ctx.start)
        return grad_grad_y, grad_x, None, None, None, None, None, None

    torch.library.register_autograd(
        f"{namespace}::conv2d_slice_weight_grad", backward, setup_context=_save_weight_grad
    )


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, conv_weight, w1, b1, w2, _, ctx.activation, gate, spatial_weight, spatial_bias, ctx.residual, _ = (
        inputs
    )
    ctx.save_for_backward(x, conv_weight, w1, b1, w2, gate, spatial_weight, spatial_bias)


def _activated(activation: int, a: Tensor, grad: Tensor | None) -> Tensor:
    """The activation of a, or its gradient."""
    if activation == 0:
        return F.relu(a) if grad is None else grad * (a > 0)
    return F.gelu(a) if grad is None else torch.ops.aten.gelu_backward(grad, a)


def _register_partial_mlp(namespace: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, conv_weight, w1, b1, w2, gate, spatial_weight, spatial_bias = ctx.saved_tensors
        ops = getattr(torch.ops, namespace)
        conv = ops.conv2d_slice
        width, channels = conv_weight.size(0), x.size(1)
        geometry = [1, 1], [1, 1], [1, 1], 1, 0

        # the forward pass again, pixels [B, H, W, channels]
        pixels, out_grad = x.movedim(1, -1), grad.movedim(1, -1)
        kept = pixels[..., width:]
        factor = None if gate is None else gate[:, None, None, :]
        mixed = conv(x, conv_weight, None, *geometry).movedim(1, -1)
        u = torch.cat([mixed, kept if factor is None else kept * factor], dim=-1)
        first, second = w1.flatten(1), w2.flatten(1)
        raised = u @ first.mT + b1
        h = _activated(ctx.activation, raised, None)

        o_grad, h_extra, spatial_grad, bias_grad = out_grad, None, None, None
        if spatial_weight is not None:
            score = h @ spatial_weight
            if spatial_bias is not None:
                score = score + spatial_bias
            scaled = channels - channels // 2
            lower = out_grad[..., :scaled]
            o_grad = torch.cat([lower * F.hardsigmoid(score)[..., None], out_grad[..., scaled:]], dim=-1)
            scale_grad = (lower * (h @ second[:scaled].mT)).sum(-1)
            score_grad = scale_grad * ((score > -3) & (score < 3)) / 6
            h_extra = score_grad[..., None] * spatial_weight
            spatial_grad = torch.einsum("bij,bijm->m", score_grad, h)
            bias_grad = None if spatial_bias is None else score_grad.sum().view(1)
        h_grad = o_grad @ second
        if h_extra is not None:
            h_grad = h_grad + h_extra
        raised_grad = _activated(ctx.activation, raised, h_grad)
        u_grad = raised_grad @ first
        mixed_grad, kept_grad = u_grad[..., :width].movedim(-1, 1), u_grad[..., width:]
        x_grad = conv(mixed_grad, _rotated(conv_weight, 1), None, *geometry)
        through = (kept_grad if factor is None else kept_grad * factor).movedim(-1, 1)
        x_grad = torch.cat([x_grad, through], dim=1)
        conv_grad = ops.conv2d_slice_weight_grad(mixed_grad, x, conv_weight.shape, *geometry)
        return (
            x_grad + grad if ctx.residual else x_grad,
            conv_grad,
            torch.einsum("bijm,bijc->mc", raised_grad, u).view_as(w1),
            raised_grad.sum((0, 1, 2)),
            torch.einsum("bijc,bijm->cm", o_grad, h).view_as(w2),
            grad.sum((0, 2, 3)),
            None,
            None if gate is None else (kept_grad * kept).sum((1, 2)),
            spatial_grad,
            bias_grad,
            None,
            None,
        )

    torch.library.register_autograd(f"{namespace}::partial_mlp", backward, setup_context=_save_mlp)


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.start = inputs
    ctx.save_for_backward(x, *output)


def _stats_gradient(
    x: Tensor, start: int, mean: Tensor, std: Tensor, grad_mean: Tensor, grad_std: Tensor
) -> Tensor:
    """The gradient of x, whose channels from `start` on were measured."""
    pixels = x.size(2) * x.size(3)
    # a constant channel's deviation has no slope to speak of: torch says 0 there, and so do we
    slope = (grad_std / std).masked_fill(std == 0, 0) / (pixels - 1) if pixels > 1 else grad_std / 0.0
    apart = x[:, start:] - mean[:, :, None, None]
    grad = grad_mean[:, :, None, None] / pixels + slope[:, :, None, None] * apart
    return F.pad(grad, (0, 0, 0, 0, start, 0))


def _stats_backward(ctx: Any, grad_mean: Tensor, grad_std: Tensor) -> tuple[Tensor, None]:
    x, mean, std = ctx.saved_tensors
    return _stats_gradient(x, ctx.start, mean, std, grad_mean, grad_std), None


def _save_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.start, weight, bias = inputs
    ctx.save_for_backward(x, weight, bias)


def _register_channel_gate(namespace: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x, weight, bias = ctx.saved_tensors
        mean, std = getattr(torch.ops, namespace).channel_stats(x, ctx.start)
        moments = torch.cat([mean, std], dim=1)
        score = F.linear(moments, weight, bias)
        score_grad = grad * ((score > -3) & (score < 3)) / 6
        grad_mean, grad_std = (score_grad @ weight).chunk(2, dim=1)
        grad_x = _stats_gradient(x, ctx.start, mean, std, grad_mean, grad_std)
        return grad_x, None, score_grad.mT @ moments, score_grad.sum(0)

    torch.library.register_autograd(f"{namespace}::channel_gate", backward, setup_context=_save_gate)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.start, *weights, ctx.heads, ctx.eps, _, _ = inputs
    ctx.save_for_backward(x, *weights)


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, qkv_weight, qkv_bias, proj_weight, _, bias = ctx.saved_tensors
    start, heads = ctx.start, ctx.heads

    # the forward pass again, pixels [B, HW, channels] and heads [B, heads, HW, d]
    def split(pixels: Tensor) -> Tensor:
        return pixels.unflatten(2, (heads, -1)).transpose(1, 2)

    attended = x[:, start:].flatten(2).mT
    wide = attended.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, 2, correction=0, keepdim=True)
    scale = (variance + ctx.eps).rsqrt()
    exact = (wide - mean) * scale
    normed = exact.to(x.dtype)
    channels = normed.size(2)
    q, k, v = (split(t) for t in F.linear(normed, qkv_weight, qkv_bias).split(channels, dim=2))
    factor = q.size(3) ** -0.5
    weights = torch.softmax(q * factor @ k.mT + bias, dim=3)
    mixed = (weights @ v).transpose(1, 2).flatten(2)

    out_grad = grad[:, start:].flatten(2).mT
    head_grad = split(out_grad @ proj_weight)
    weights_grad = head_grad @ v.mT
    score_grad = weights * (weights_grad - (weights_grad * weights).sum(3, keepdim=True))
    parts = score_grad @ k * factor, score_grad.mT @ q * factor, weights.mT @ head_grad
    qkv_grad = torch.cat([part.transpose(1, 2).flatten(2) for part in parts], dim=2)
    normed_grad = (qkv_grad @ qkv_weight).to(wide.dtype)
    along = (normed_grad * exact).mean(2, keepdim=True)
    wide_grad = scale * (normed_grad - normed_grad.mean(2, keepdim=True) - exact * along)
    attended_grad = (out_grad + wide_grad.to(x.dtype)).mT.unflatten(2, x.shape[2:])
    return (
        torch.cat([grad[:, :start], attended_grad], dim=1),
        None,
        torch.einsum("bpm,bpc->mc", qkv_grad, normed),
        qkv_grad.sum((0, 1)),
        torch.einsum("bpm,bpc->mc", out_grad, mixed),
        out_grad.sum((0, 1)),
        score_grad.sum(0),
        None,
        None,
        None,
        None,
    )


for _namespace in _library.NAMESPACES:
    _register_partial_mlp(_namespace)
    torch.library.register_autograd(
        f"{_namespace}::channel_stats", _stats_backward, setup_context=_save_stats
    )
    _register_channel_gate(_namespace)
    torch.library.register_autograd(
        f"{_namespace}::partial_attention", _attention_backward, setup_context=_save_attention
    )
    _register_partial_conv2d(_namespace)
    _register_conv2d_slice(_namespace)
    _register_weight_grad(_namespace)
