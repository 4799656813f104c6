"""ONNX files of models of this family, in operators that every runtime has: Split, Conv, Concat and the like."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tranche import _library
from tranche._extras import require
from tranche.pconv.ops import ACTIVATIONS


def _conv2d_slice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    start: int = 0,
    packed: Tensor | None = None,
) -> Tensor:
    width = groups * weight.size(1)
    part = x.split([start, width, x.size(1) - start - width], dim=1)[1] if width < x.size(1) else x
    return F.conv2d(part, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def _partial_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    start: int = 0,
    packed: Tensor | None = None,
) -> Tensor:
    width = weight.size(0)
    before, part, after = x.split([start, width, x.size(1) - start - width], dim=1)
    mixed = F.conv2d(part, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    return torch.cat([t for t in (before, mixed, after) if t.size(1)], dim=1)


def _channel_stats(x: Tensor, start: int) -> tuple[Tensor, Tensor]:
    part = x.split([start, x.size(1) - start], dim=1)[1]
    return part.mean((2, 3)), part.std((2, 3))


def _channel_gate(x: Tensor, start: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.hardsigmoid(F.linear(torch.cat(_channel_stats(x, start), dim=1), weight, bias))


def _partial_mlp(
    x: Tensor,
    conv_weight: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: int = 0,
    gate: Tensor | None = None,
    spatial_weight: Tensor | None = None,
    spatial_bias: Tensor | None = None,
    residual: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    width, channels = conv_weight.size(0), x.size(1)
    if width < channels:
        part, rest = x.split([width, channels - width], dim=1)
        rest = rest if gate is None else rest * gate[:, :, None, None]
        mixed = torch.cat([F.conv2d(part, conv_weight, padding=1), rest], dim=1)
    else:
        mixed = F.conv2d(x, conv_weight, padding=1)
    hidden = F.conv2d(mixed, w1.view(-1, channels, 1, 1), b1)
    hidden = F.relu(hidden) if activation == ACTIVATIONS["relu"] else F.gelu(hidden)
    second = w2.view(channels, -1, 1, 1)
    if spatial_weight is None:
        out = F.conv2d(hidden, second, b2)
    else:
        score = F.conv2d(hidden, spatial_weight.view(1, -1, 1, 1), spatial_bias)
        gated, free = F.conv2d(hidden, second).split([channels - channels // 2, channels // 2], dim=1)
        out = torch.cat([gated * F.hardsigmoid(score), free], dim=1) + b2[:, None, None]
    return out + x if residual else out


def _partial_attention(
    x: Tensor,
    start: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    bias: Tensor,
    num_heads: int,
    eps: float = 1e-6,
    qkv_packed: Tensor | None = None,
    proj_packed: Tensor | None = None,
) -> Tensor:
    before, part = x.split([start, x.size(1) - start], dim=1)
    pixels = part.permute(0, 2, 3, 1).flatten(1, 2)
    normed = F.layer_norm(pixels, [pixels.size(2)], eps=eps)
    heads = F.linear(normed, qkv_weight, qkv_bias).unflatten(2, (3, num_heads, -1))
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    weights = torch.softmax(q @ k.transpose(2, 3) / q.size(-1) ** 0.5 + bias, dim=-1)
    mixed = F.linear((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    attended = part + mixed.transpose(1, 2).unflatten(2, (x.size(2), x.size(3)))
    return torch.cat([before, attended], dim=1) if start else attended


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """For each op of the family, what it does in torch's ops that are ONNX operators."""
    table: dict[Any, Callable[..., Any]] = {}
    for namespace in _library.NAMESPACES:
        ops = getattr(torch.ops, namespace)
        table[ops.conv2d_slice.default] = _conv2d_slice
        table[ops.partial_conv2d.default] = _partial_conv2d
        table[ops.partial_mlp.default] = _partial_mlp
        table[ops.channel_stats.default] = _channel_stats
        table[ops.channel_gate.default] = _channel_gate
        table[ops.partial_attention.default] = _partial_attention
    return table


def export_onnx(
    model: nn.Module, path: str | os.PathLike[str], example: Tensor, *, dynamic_batch: bool = True
) -> None:
    """Write a model in evaluation, folded or not, as an ONNX file that needs nothing of this package.

    Our ops become Split, Conv and Concat; the bias table of PAT_sf goes along. The model is left as it was: nothing
    that was traced is kept in it.

    Args:
        model: in evaluation; a `PartialNet`, what `fold` made of one, or any model that calls the ops of this family.
        path: of the file.
        example: [B, C, H, W]: the size of image the file will be for, on the model's device and of its dtype.
        dynamic_batch: leave the batch open.

    Raises:
        ValueError: a model in training mode.
        ImportError: onnx or onnxscript is not installed.
    """
    if any(module.training for module in model.modules()):
        raise ValueError(
            "tranche.pconv.export_onnx: expected a model in evaluation, got one in training. Call eval()."
        )
    require("tranche.pconv.export_onnx", "onnx", "onnxscript")
    shapes: Any = None
    if dynamic_batch:
        example = example[:1].expand(2, -1, -1, -1)  # a batch of one would be taken for a constant
        shapes = ({0: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
        program = program.run_decompositions(_decompositions())
    torch.onnx.export(
        program, (), os.fspath(path), dynamo=True, external_data=False, verbose=False, input_names=["x"]
    )
