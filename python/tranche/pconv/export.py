"""ONNX files of models of this family, in operators that every runtime has: Split, Conv, Concat and the like."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tranche import _library


def _conv2d_slice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    start: int = 0,
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
) -> Tensor:
    width = weight.size(0)
    before, part, after = x.split([start, width, x.size(1) - start - width], dim=1)
    mixed = F.conv2d(part, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    return torch.cat([t for t in (before, mixed, after) if t.size(1)], dim=1)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """For each op of the family, what it does in torch's ops that are ONNX operators."""
    table: dict[Any, Callable[..., Any]] = {}
    for namespace in _library.NAMESPACES:
        ops = getattr(torch.ops, namespace)
        table[ops.conv2d_slice.default] = _conv2d_slice
        table[ops.partial_conv2d.default] = _partial_conv2d
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
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("Writing ONNX needs onnx and onnxscript: pip install onnx onnxscript.") from error
    shapes = None
    if dynamic_batch:
        example = example[:1].expand(2, -1, -1, -1)  # a batch of one would be taken for a constant
        shapes = ({0: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
        program = program.run_decompositions(_decompositions())
    torch.onnx.export(
        program, (), os.fspath(path), dynamo=True, external_data=False, verbose=False, input_names=["x"]
    )
