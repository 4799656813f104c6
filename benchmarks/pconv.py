"""Rows of the family `pconv`: partial convolution at the stage shapes of PartialNet, and whole networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import pconv_network
from benchmarks.harness import Row, Workload
from tranche.pconv import partial_conv2d, partial_conv2d_, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EMBEDDINGS = {"t0": 32, "t1": 48, "t2": 64, "s": 96, "m": 128, "l": 160}
# The shapes that have bars on the CPU: batch, channels, side.
BARRED = ((8, 64, 56), (8, 128, 28), (8, 512, 7), (1, 64, 56))


class Convolution:
    """A 3x3 convolution of a quarter of the channels, and the same in torch's words, over rotating inputs."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, layout: str, device: str, buffers: int
    ):
        batch, channels, side = shape
        self.width = channels // 4
        x = torch.randn(batch, channels, side, side, dtype=dtype, device=device)
        if layout == "nhwc":
            x = x.contiguous(memory_format=torch.channels_last)
        self.inputs = [x.clone() for _ in range(buffers)]
        scale = (9 * self.width) ** -0.5
        self.weight = (scale * torch.randn(self.width, self.width, 3, 3, device=device)).to(dtype)
        self.compiled = torch.compile(self._split_cat, dynamic=False)

    def _split_cat(self, x: Tensor) -> Tensor:
        part, rest = x.split([self.width, x.size(1) - self.width], dim=1)
        return torch.cat([F.conv2d(part, self.weight, padding=1), rest], dim=1)

    def ours(self, i: int) -> Tensor:
        return partial_conv2d(self.inputs[i], self.weight, padding=1)

    def split_cat(self, i: int) -> Tensor:
        return self._split_cat(self.inputs[i])

    def clone_slice(self, i: int) -> Tensor:
        y = self.inputs[i].clone()
        y[:, : self.width] = F.conv2d(y[:, : self.width], self.weight, padding=1)
        return y

    def compile(self, i: int) -> Tensor:
        return self.compiled(self.inputs[i])

    def ours_in_place(self, i: int) -> Tensor:
        partial_conv2d_(self.inputs[i], self.weight, padding=1)
        return self.inputs[i]

    def slice_in_place(self, i: int) -> Tensor:
        x = self.inputs[i]
        x[:, : self.width] = F.conv2d(x[:, : self.width], self.weight, padding=1)
        return x

    def in_place_error(self, _: Tensor) -> float:
        """What the first buffer holds by now is no longer known: a fresh one is tried instead."""
        x = self.inputs[-1].clone()
        want = reference.partial_conv2d(x.double(), self.weight.double(), padding=1)
        partial_conv2d_(x, self.weight, padding=1)
        return float((x.double() - want).abs().max())


def row(
    op: str, name: str, shape: tuple[int, int, int], dtype: str, layout: str, device: str, barred: bool
) -> Row:
    batch, channels, side = shape
    pixels, width, size = batch * side * side, channels // 4, DTYPES[dtype].itemsize
    in_place = op == "pconv_conv2d_"

    def build(buffers: int) -> Workload:
        case = Convolution(shape, DTYPES[dtype], layout, device, buffers)
        tolerance = 1e-4 if dtype == "fp32" else 0.05
        if in_place:
            baselines = {"split_cat": case.split_cat, "slice": case.slice_in_place}
            return Workload(case.ours_in_place, baselines, case.in_place_error, tolerance)
        want = reference.partial_conv2d(case.inputs[0].double(), case.weight.double(), padding=1)
        baselines = {"split_cat": case.split_cat, "clone_slice": case.clone_slice, "compile": case.compile}
        return Workload(case.ours, baselines, lambda y: float((y.double() - want).abs().max()), tolerance)

    return Row(
        op=op,
        shape=f"{name} {batch}x{channels}x{side}x{side} {layout}",
        dtype=dtype,
        bytes_read=pixels * size * (width if in_place else channels) + 9 * width * width * size,
        operations=2 * pixels * 9 * width * width,
        math="fp32" if dtype == "fp32" else "bf16",
        build=build,
        bars={"best": 2.0 if in_place else 1.0} if barred else {},
        quick=barred and batch == 8,
    )


def rows(device: str) -> list[Row]:
    """The barred shapes first, then every stage of every model."""
    result = []
    for shape in BARRED if device == "cpu" else ((256, 64, 56), (256, 96, 56), (256, 160, 56)):
        for dtype in DTYPES:
            for op in ("pconv_conv2d", "pconv_conv2d_"):
                result.append(row(op, "bar", shape, dtype, "nhwc", device, barred=True))
    for model, embedding in EMBEDDINGS.items():
        for stage in range(4):
            for batch in (1, 32) if device == "cpu" else (1, 32, 256):
                for layout in ("nchw", "nhwc"):
                    shape = (batch, embedding << stage, 56 >> stage)
                    name = f"partialnet-{model}.{stage + 1}"
                    result.append(row("pconv_conv2d", name, shape, "bf16", layout, device, barred=False))
    return result + pconv_network.rows(device)
