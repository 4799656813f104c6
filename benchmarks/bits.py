"""Rows of the family `bits`: linear layers of Llama 3 at every precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, Workload
from tranche import bits
from tranche.bits import PackedWeight, reference
from tranche.bits.packed import LAYOUTS, Layout


@dataclass(frozen=True)
class Layer:
    """One linear layer of one model."""

    name: str
    outputs: int
    inputs: int


QKV_8B = Layer("llama-3-8b.o", 4096, 4096)
DOWN_7B = Layer("llama-2-7b.up", 11008, 4096)
DOWN_8B = Layer("llama-3-8b.down", 4096, 14336)
O_70B = Layer("llama-3-70b.o", 8192, 8192)


INT4_GROUP = 128  # inputs that share a scale in torch's int4 product


def prefix_copy(data: Tensor, size: int) -> Tensor:
    """A tensor as large as data with its first `size` bytes: the rest is never read, and on Linux takes no memory."""
    copy = torch.empty_like(data)
    copy[:size] = data[:size]
    return copy


class Linear:
    """One layer over rotating copies of its weight, and the same in torch's words.

    Each form gets as many copies as make `rotation` bytes of what it reads.
    """

    def __init__(
        self,
        layer: Layer,
        rows: int,
        width: int,
        activation_bits: int | None,
        layout: Layout,
        device: str,
        rotation: int,
    ):
        self.width, self.activation_bits = width, activation_bits
        self.rotation = rotation
        codes = torch.randint(-128, 128, (layer.outputs, layer.inputs), dtype=torch.int8, device=device)
        self.scale = torch.rand(layer.outputs, device=device) * 1e-3
        first = bits.pack(codes, layout=layout)
        read = first.bytes_read(width)
        self.packed = [replace(first, data=prefix_copy(first.data, read)) for _ in range(self.copies(read))]
        weight = bits.dequantize(first, self.scale, width, torch.bfloat16)
        self.bf16 = [weight.clone() for _ in range(self.copies(2 * weight.numel()))]
        self.fp32 = [weight.float() for _ in range(self.copies(4 * weight.numel()))]
        self.codes = [codes.clone() for _ in range(self.copies(codes.numel()) if width == 8 else 0)]
        self.int4 = self.int4_weights(bits.unpack(first, 4)) if width == 4 and device == "cpu" else []
        self.x = torch.randn(rows, layer.inputs, device=device).bfloat16()
        self.x32 = self.x.float()
        self.x_codes, self.x_scale, _ = bits.quantize_activations(self.x)

    def copies(self, size: int) -> int:
        return max(2, -(-self.rotation // size))

    def int4_weights(self, codes: Tensor) -> list[Tensor]:
        groups = codes.size(1) // INT4_GROUP
        scales = (16 * self.scale).view(1, -1).expand(groups, -1)
        self.int4_scales = torch.stack([scales, torch.zeros_like(scales)], dim=2).bfloat16().contiguous()
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 2)
        return [packed.clone() for _ in range(self.copies(packed.numel()))]

    def ours(self, i: int) -> Tensor:
        return bits.linear(
            self.x,
            self.packed[i % len(self.packed)],
            self.scale,
            self.width,
            activation_bits=self.activation_bits,
        )

    def bf16_linear(self, i: int) -> Tensor:
        return F.linear(self.x, self.bf16[i % len(self.bf16)])

    def fp32_linear(self, i: int) -> Tensor:
        return F.linear(self.x32, self.fp32[i % len(self.fp32)])

    def int_mm(self, i: int) -> Tensor:
        return torch._int_mm(self.x_codes, self.codes[i % len(self.codes)].T)

    def int8pack_mm(self, i: int) -> Tensor:
        return torch._weight_int8pack_mm(self.x, self.codes[i % len(self.codes)], self.scale.bfloat16())

    def int4pack_mm(self, i: int) -> Tensor:
        weight = self.int4[i % len(self.int4)]
        return torch._weight_int4pack_mm_for_cpu(self.x, weight, INT4_GROUP, self.int4_scales)

    def workload(self) -> Workload:
        weight = reference.dequantize(self.packed[0], self.scale, self.width, torch.float32)
        expected = self.x32 @ weight.T
        size = float(expected.abs().max())
        baselines = {"bf16": self.bf16_linear, "fp32": self.fp32_linear}
        layouts = {}
        if self.width == 8 and (self.x.size(0) > 16 or not self.x.is_cuda):
            baselines["int-mm"] = self.int_mm
            layouts["int-mm"] = lambda sums: sums * self.x_scale * self.scale
        if self.width == 8 and not self.x.is_cuda and self.x.size(0) <= 64:
            baselines["int8pack-mm"] = self.int8pack_mm
        if self.int4:
            baselines["int4pack-mm"] = self.int4pack_mm
        return Workload(
            ours=self.ours,
            baselines=baselines,
            error=lambda out: float((out.float() - expected).abs().max()) / size,
            tolerance=2e-2,  # of the largest output: the rounding of the activations to 8 bits
            layouts=layouts,
        )


def linear_row(
    layer: Layer,
    rows: int,
    width: int,
    device: str,
    *,
    activation_bits: int | None = 8,
    layout: Layout = "guarded",
    bars: dict[str, float] | None = None,
    least_percent: float | None = None,
    quick: bool = False,
) -> Row:
    """One layer at one precision."""
    whole = 512 * -(-layer.outputs // 16) * -(-layer.inputs // 32)
    packed = PackedWeight(
        torch.empty(whole, dtype=torch.uint8, device="meta"), layer.outputs, layer.inputs, LAYOUTS[layout]
    )
    return Row(
        op="bits_linear",
        shape=f"{layer.name} M{rows} {width}bit"
        + ("" if activation_bits else " weight-only")
        + (" single-planes" if layout == "single" else ""),
        dtype="bf16",
        bytes_read=packed.bytes_read(width) + 2 * rows * layer.inputs,
        operations=2 * rows * layer.outputs * layer.inputs,
        math="int8" if activation_bits else "fp32",
        build=lambda buffers: Linear(
            layer, rows, width, activation_bits, layout, device, buffers * packed.bytes_read(width)
        ).workload(),
        bars=bars if bars and device == "cpu" else {},
        least_percent=least_percent if device == "cpu" else None,
        quick=quick,
    )


def rows(device: str) -> list[Row]:
    """All rows for a device."""
    table = []
    for layer in (QKV_8B, DOWN_7B):
        for width, bar in ((8, 3.3), (6, None), (4, 5.0), (2, 7.5)):
            quick = layer is QKV_8B and width != 6
            bars = {"bf16": bar} if bar else {}
            least = 85.0 if width == 8 else None
            table.append(linear_row(layer, 1, width, device, bars=bars, least_percent=least, quick=quick))
    for width in (5, 3):
        table.append(linear_row(QKV_8B, 1, width, device))
        table.append(linear_row(QKV_8B, 1, width, device, layout="single"))
    for width in (8, 4, 2):
        table.append(linear_row(QKV_8B, 1, width, device, activation_bits=None))
    for layer in (DOWN_8B, O_70B):
        table += [linear_row(layer, 1, width, device) for width in (8, 2)]
    table.append(
        linear_row(QKV_8B, 8, 8, device, bars={"bf16": 1.8, "int-mm": 1.0, "int8pack-mm": 1.0}, quick=True)
    )
    table.append(linear_row(QKV_8B, 64, 8, device, bars={"bf16": 1.2, "int-mm": 1.0, "int8pack-mm": 1.0}))
    for width in (8, 4, 2):
        table.append(linear_row(QKV_8B, 512, width, device, bars={"int-mm": 0.9} if width == 8 else {}))
    table += [linear_row(QKV_8B, 4096, width, device) for width in (8, 4)]
    return table
