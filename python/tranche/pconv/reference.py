"""What the family's ops mean, in plain torch and any floating dtype. Slow and clear; the tests' oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

Pair = int | tuple[int, int]


def conv2d_slice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    start: int = 0,
    packed: Tensor | None = None,
) -> Tensor:
    """See `tranche.pconv.conv2d_slice`."""
    part = x[:, start : start + groups * weight.size(1)]
    return F.conv2d(part, weight, bias, stride, padding, dilation, groups)


def conv2d_pack(
    weight: Tensor, bias: Tensor | None = None, stride: Pair = 1, dilation: Pair = 1, groups: int = 1
) -> Tensor:
    """See `tranche.pconv.conv2d_pack`: nothing, and what takes it reads the weights."""
    return weight.new_empty(0, dtype=torch.uint8)


def conv2d_slice_weight_grad(
    grad_y: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    start: int = 0,
) -> Tensor:
    """See `tranche.pconv.conv2d_slice_weight_grad`."""
    part = x[:, start : start + groups * weight_size[1]]
    return conv2d_weight(part, weight_size, grad_y, stride, padding, dilation, groups)


def partial_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    start: int = 0,
    packed: Tensor | None = None,
) -> Tensor:
    """See `tranche.pconv.partial_conv2d`."""
    stop = start + groups * weight.size(1)
    part = conv2d_slice(x, weight, bias, stride, padding, dilation, groups, start=start)
    return torch.cat([x[:, :start], part, x[:, stop:]], dim=1)


def partial_mlp(
    x: Tensor,
    conv_weight: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    activation: str = "relu",
    gate: Tensor | None = None,
    spatial_weight: Tensor | None = None,
    spatial_bias: Tensor | None = None,
    residual: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    """See `tranche.pconv.partial_mlp`."""
    channels, width = x.size(1), conv_weight.size(0)
    mixed = F.conv2d(x[:, :width], conv_weight, padding=1)
    untouched = x[:, width:] if gate is None else x[:, width:] * gate[:, :, None, None]
    pixels = torch.cat([mixed, untouched], dim=1).movedim(1, -1)
    hidden = pixels @ w1.flatten(1).T + b1
    hidden = F.relu(hidden) if activation == "relu" else F.gelu(hidden)
    out = hidden @ w2.flatten(1).T
    if spatial_weight is not None:
        score = hidden @ spatial_weight
        scale = F.hardsigmoid(score if spatial_bias is None else score + spatial_bias)[..., None]
        first = channels - channels // 2
        out = torch.cat([out[..., :first] * scale, out[..., first:]], dim=-1)
    out = (out + b2).movedim(-1, 1)
    return out + x if residual else out


def partial_mlp_pack(conv_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """See `tranche.pconv.partial_mlp_pack`: nothing, and what takes it reads the weights."""
    return b2.new_empty(0, dtype=torch.uint8)


def channel_stats(x: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """See `tranche.pconv.channel_stats`."""
    part = x[:, start:].flatten(2)
    return part.mean(dim=2), part.std(dim=2)


def channel_gate(x: Tensor, start: int, weight: Tensor, bias: Tensor) -> Tensor:
    """See `tranche.pconv.channel_gate`."""
    return F.hardsigmoid(F.linear(torch.cat(channel_stats(x, start), dim=1), weight, bias))


def partial_attention(
    x: Tensor,
    start: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    bias: Tensor,
    num_heads: int,
    *,
    eps: float = 1e-6,
    qkv_packed: Tensor | None = None,
    proj_packed: Tensor | None = None,
) -> Tensor:
    """See `tranche.pconv.partial_attention`."""
    pixels = x[:, start:].flatten(2).mT
    normed = F.layer_norm(pixels, pixels.shape[2:], eps=eps)
    heads = F.linear(normed, qkv_weight, qkv_bias).unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = heads.unbind(0)
    weights = torch.softmax(q @ k.mT / q.size(-1) ** 0.5 + bias, dim=-1)
    mixed = F.linear((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    return torch.cat([x[:, :start], (pixels + mixed).mT.unflatten(2, x.shape[2:])], dim=1)
