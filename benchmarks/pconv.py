"""Rows of the family `pconv`: partial convolution, its weight's gradient and the fused block; its networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import pconv_attention, pconv_network
from benchmarks.harness import Row, Workload
from tranche.pconv import conv2d_slice_weight_grad, partial_conv2d, partial_conv2d_, partial_mlp, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EMBEDDINGS = {"t0": 32, "t1": 48, "t2": 64, "s": 96, "m": 128, "l": 160}
Shape = tuple[int, int, int]  # batch, channels, side
# The shapes that have bars.
BARRED: dict[str, tuple[Shape, ...]] = {
    "cpu": ((8, 64, 56), (8, 128, 28), (8, 512, 7), (1, 64, 56)),
    "cuda": ((256, 64, 56), (256, 96, 56), (256, 160, 56)),
}
# Times the best baseline. A row of the CPU's conv must not be slower; its geometric mean is to be 1.5.
BARS = {
    "cpu": {"pconv_conv2d": 1.0, "pconv_conv2d_": 2.0, "pconv_mlp": 1.5},
    "cuda": {"pconv_conv2d": 1.4, "pconv_conv2d_": 3.0, "pconv_mlp": 1.5},
}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


class Forms:
    """A 3x3 convolution of a quarter of the channels over rotating inputs: ours, and torch's words for it."""

    def __init__(self, shape: Shape, dtype: torch.dtype, layout: str, device: str, buffers: int):
        batch, channels, side = shape
        self.width, hidden = channels // 4, 2 * channels
        x = torch.randn(batch, channels, side, side, dtype=dtype, device=device)
        self.layout, self.x = layout, x
        self.inputs = {layout: [x.clone(memory_format=FORMATS[layout]) for _ in range(buffers)]}

        def weight(out: int, taps: int, depth: int) -> Tensor:
            return (torch.randn(out, depth, taps, taps, device=device) / (taps * taps * depth) ** 0.5).to(
                dtype
            )

        self.weight = weight(self.width, 3, self.width)
        self.w1, self.w2 = weight(hidden, 1, channels), weight(channels, 1, hidden)
        self.b1, self.b2 = (torch.randn(n, device=device).to(dtype) for n in (hidden, channels))

    def input(self, i: int, layout: str) -> Tensor:
        """Buffer i; those of the other layout are made when first asked for."""
        if layout not in self.inputs:
            self.inputs[layout] = [x.clone(memory_format=FORMATS[layout]) for x in self.inputs[self.layout]]
        return self.inputs[layout][i]

    def split_cat(self, x: Tensor) -> Tensor:
        part, rest = x.split([self.width, x.size(1) - self.width], dim=1)
        return torch.cat([F.conv2d(part, self.weight, padding=1), rest], dim=1)

    def clone_slice(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, : self.width] = F.conv2d(y[:, : self.width], self.weight, padding=1)
        return y

    def rest_of_block(self, x: Tensor, mixed: Tensor) -> Tensor:
        hidden = F.relu(F.conv2d(mixed, self.w1, self.b1))
        return x + F.conv2d(hidden, self.w2, self.b2)

    def conv(self, x: Tensor) -> Tensor:
        return partial_conv2d(x, self.weight, padding=1)

    def conv_in_place(self, x: Tensor) -> Tensor:
        partial_conv2d_(x, self.weight, padding=1)
        return x

    def block(self, x: Tensor) -> Tensor:
        return partial_mlp(x, self.weight, self.w1, self.b1, self.w2, self.b2)

    def baselines(self, whole_block: bool, both_layouts: bool) -> dict[str, Callable[[int], Tensor]]:
        """Eager forms in the row's layout, and in the other one or compiled."""

        def form(convolve: Callable[[Tensor], Tensor], layout: str) -> Callable[[int], Tensor]:
            if whole_block:
                return lambda i: self.rest_of_block(x := self.input(i, layout), convolve(x))
            return lambda i: convolve(self.input(i, layout))

        forms = {"split_cat": self.split_cat, "clone_slice": self.clone_slice}
        result = {name: form(f, self.layout) for name, f in forms.items()}
        if both_layouts:
            other = "nchw" if self.layout == "nhwc" else "nhwc"
            return result | {f"{name}_{other}": form(f, other) for name, f in forms.items()}
        compiled = torch.compile(
            (lambda x: self.rest_of_block(x, self.split_cat(x))) if whole_block else self.split_cat,
            dynamic=False,
        )
        return result | {"compile": lambda i: compiled(self.input(i, self.layout))}

    def want(self, whole_block: bool) -> Tensor:
        """The fp64 result."""
        x, weight = self.x.double(), self.weight.double()
        if not whole_block:
            return reference.partial_conv2d(x, weight, padding=1)
        layers = (t.double() for t in (self.w1, self.b1, self.w2, self.b2))
        return reference.partial_mlp(x, weight, *layers)


def row(op: str, name: str, shape: Shape, dtype: str, layout: str, device: str, barred: bool) -> Row:
    batch, channels, side = shape
    pixels, width, size = batch * side * side, channels // 4, DTYPES[dtype].itemsize
    in_place, whole_block = op == "pconv_conv2d_", op == "pconv_mlp"
    touched = width if in_place else channels
    weights = 9 * width * width + (4 * channels * channels if whole_block else 0)

    def build(buffers: int) -> Workload:
        forms = Forms(shape, DTYPES[dtype], layout, device, buffers)
        want = forms.want(whole_block)

        def error(y: Tensor) -> float:
            return float((y.double() - want).abs().max())

        def in_place_error(y: Tensor) -> float:
            # what the buffers hold by now is no longer known: a fresh one is tried instead
            return error(forms.conv_in_place(forms.x.clone(memory_format=FORMATS[layout])))

        ours = forms.conv_in_place if in_place else forms.block if whole_block else forms.conv
        return Workload(
            lambda i: ours(forms.input(i, layout)),
            forms.baselines(whole_block, both_layouts=barred),
            in_place_error if in_place else error,
            1e-4 if dtype == "fp32" else 0.15 if whole_block else 0.05,
        )

    return Row(
        op=op,
        shape=f"{name} {batch}x{channels}x{side}x{side} {layout}",
        dtype=dtype,
        bytes_read=(pixels * touched + weights) * size,
        bytes_written=pixels * touched * size,
        operations=2 * pixels * (9 * width * width + (4 * channels * channels if whole_block else 0)),
        math="fp32" if dtype == "fp32" else "bf16",
        build=build,
        bars={"best": BARS[device][op]} if barred else {},
        quick=barred and shape[0] != 1 and dtype == "bf16",
    )


def weight_grad_row(shape: Shape, dtype: str, device: str) -> Row:
    """The gradient of a 3x3 convolution's weight, from slices of a quarter of the channels, channels_last."""
    batch, channels, side = shape
    pixels, width, size = batch * side * side, channels // 4, DTYPES[dtype].itemsize

    def build(buffers: int) -> Workload:
        x, grad = (torch.randn(shape[0], channels, side, side, device=device) for _ in range(2))
        x, grad = x.to(DTYPES[dtype]), grad.to(DTYPES[dtype])
        weight = torch.empty(width, width, 3, 3, dtype=DTYPES[dtype], device=device)
        copies = {
            name: [tuple(t.clone(memory_format=f) for t in (grad, x)) for _ in range(buffers)]
            for name, f in FORMATS.items()
        }

        def torchs(layout: str) -> Callable[[int], Tensor]:
            def call(i: int) -> Tensor:
                grad, x = (t[:, :width] for t in copies[layout][i])
                return torch.ops.aten.convolution_backward(
                    grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
                )[1]

            return call

        def ours(i: int) -> Tensor:
            grad, x = copies["nhwc"][i]
            return conv2d_slice_weight_grad(grad[:, :width], x, weight.shape, padding=1)

        want = reference.conv2d_slice_weight_grad(
            grad[:, :width].double(), x.double(), list(weight.shape), padding=1
        )
        return Workload(
            ours,
            {"torch": torchs("nhwc"), "torch_nchw": torchs("nchw")},
            lambda got: float((got.double() - want).abs().max() / want.abs().max()),
            1e-5 if dtype == "fp32" else 1e-2,
        )

    return Row(
        op="pconv_weight_grad",
        shape=f"bar {batch}x{channels}x{side}x{side} nhwc",
        dtype=dtype,
        bytes_read=2 * pixels * width * size,
        bytes_written=9 * width * width * size,
        operations=2 * pixels * 9 * width * width,
        math="fp32" if dtype == "fp32" else "bf16",
        build=build,
        quick=shape[0] != 1 and dtype == "bf16",
    )


def rows(device: str) -> list[Row]:
    """The barred shapes first, then every stage of every model."""
    result = []
    for shape in BARRED[device]:
        for dtype in DTYPES if device == "cpu" else ("bf16",):
            for op in ("pconv_conv2d", "pconv_conv2d_", "pconv_mlp"):
                result.append(row(op, "bar", shape, dtype, "nhwc", device, barred=True))
            result.append(weight_grad_row(shape, dtype, device))
    for model, embedding in EMBEDDINGS.items():
        for stage in range(4):
            for batch in (1, 32, 256):
                for layout in FORMATS:
                    for op in ("pconv_conv2d", "pconv_mlp"):
                        shape = (batch, embedding << stage, 56 >> stage)
                        name = f"partialnet-{model}.{stage + 1}"
                        result.append(row(op, name, shape, "bf16", layout, device, barred=False))
    return result + pconv_attention.rows(device) + pconv_network.rows(device)
