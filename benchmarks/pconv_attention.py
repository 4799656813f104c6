"""Rows of PAT_sf's attention, against the same layers in torch's words."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, Workload
from tranche.pconv import conv2d_pack, partial_attention, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = 4
# (channels, the first that is attended, pixels a side): the last stages of PartialNet at 224, and one of detection
SHAPES = {"t0": (256, 64, 7), "t2": (512, 128, 7), "t0 at 896": (256, 64, 28)}
BATCHES = {"t0": (1, 32), "t2": (1, 32), "t0 at 896": (1,)}


class Attention:
    """Rotating images in channels_last, and rotating layers."""

    def __init__(self, name: str, batch: int, dtype: torch.dtype, device: str, buffers: int) -> None:
        channels, self.start, side = SHAPES[name]
        n = channels - self.start

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, device=device)).to(dtype)

        self.images = [
            draw(batch, channels, side, side).to(memory_format=torch.channels_last) for _ in range(buffers)
        ]
        self.layers = [
            (
                draw(3 * n, n, scale=n**-0.5),
                draw(3 * n),
                draw(n, n, scale=n**-0.5),
                draw(n),
                draw(HEADS, side**2, side**2),
            )
            for _ in range(buffers)
        ]
        self.packed = [
            (conv2d_pack(qkv[:, :, None, None], qkv_bias), conv2d_pack(proj[:, :, None, None], proj_bias))
            for qkv, qkv_bias, proj, proj_bias, _ in self.layers
        ]
        layers = [t.double() for t in self.layers[0]]
        self.want = reference.partial_attention(self.images[0].double(), self.start, *layers, HEADS)

    def ours(self, i: int) -> Tensor:
        qkv, proj = self.packed[i]
        return partial_attention(
            self.images[i], self.start, *self.layers[i], HEADS, qkv_packed=qkv, proj_packed=proj
        )

    def torchs(self, i: int) -> Tensor:
        return _torchs(self.images[i], self.start, *self.layers[i])

    def compiled(self) -> Callable[[int], Tensor]:
        whole = torch.compile(_torchs, dynamic=False)
        return lambda i: whole(self.images[i], self.start, *self.layers[i])

    def error(self, y: Tensor) -> float:
        """The largest, of the largest output."""
        return float((y.double() - self.want).abs().max() / self.want.abs().max())


def _torchs(
    x: Tensor, start: int, qkv: Tensor, qkv_bias: Tensor, proj: Tensor, proj_bias: Tensor, bias: Tensor
) -> Tensor:
    pixels = x[:, start:].permute(0, 2, 3, 1).flatten(1, 2)
    heads = F.linear(F.layer_norm(pixels, pixels.shape[2:], eps=1e-6), qkv, qkv_bias).unflatten(
        2, (3, HEADS, -1)
    )
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
    attended = pixels + F.linear(mixed.transpose(1, 2).flatten(2), proj, proj_bias)
    return torch.cat([x[:, :start], attended.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)], dim=1)


def row(name: str, batch: int, dtype: str, device: str) -> Row:
    channels, start, side = SHAPES[name]
    n, pixels, size = channels - start, side**2, DTYPES[dtype].itemsize

    def build(buffers: int) -> Workload:
        attention = Attention(name, batch, DTYPES[dtype], device, buffers)
        baselines = {"torch": attention.torchs, "compile": attention.compiled()}
        return Workload(attention.ours, baselines, attention.error, 1e-5 if dtype == "fp32" else 0.05)

    return Row(
        op="pconv_attention",
        shape=f"partialnet-{name} {batch}x{channels}x{side}x{side} from {start} nhwc",
        dtype=dtype,
        bytes_read=size * (batch * pixels * channels + 4 * n * n + HEADS * pixels**2),
        bytes_written=size * batch * pixels * channels,
        operations=2 * batch * pixels * n * (4 * n + 2 * pixels),
        math=dtype,
        build=build,
        quick=batch == 1 and name == "t0" and dtype == "fp32",
    )


def rows(device: str) -> list[Row]:
    """One image and many; on a GPU in 16 bits."""
    return [
        row(name, batch, dtype, device)
        for name, batches in BATCHES.items()
        for batch in batches
        for dtype in DTYPES
        if device == "cpu" or dtype == "bf16"
    ]
