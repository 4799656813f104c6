"""Rows of whole networks: PartialNet folded for inference, against the network in split-cat words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, Workload
from benchmarks.split_cat import split_cat
from tranche import pconv
from tranche.pconv import PartialNet, fold

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDE = 224
# billions of multiply-adds of an image, as published
COSTS = {"t0": 0.233, "t1": 0.540, "t2": 1.033, "s": 2.705, "m": 6.673, "l": 11.882}
BARS = {"t0": 1.5, "t2": 1.5}


def _ready(name: str, dtype: torch.dtype, device: str) -> PartialNet:
    """A network whose every layer counts: statistics, weights and tables at random."""
    torch.manual_seed(0)
    model: PartialNet = getattr(pconv, f"partialnet_{name}")(device=device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.25)
        if isinstance(module, pconv.PATSelf):
            nn.init.normal_(module.attn.rpe_k.lookup_table_bias)
    return model.eval().to(dtype).to(memory_format=torch.channels_last)


class Network:
    """One network three times, over rotating images in channels_last."""

    def __init__(self, name: str, batch: int, dtype: torch.dtype, device: str, buffers: int) -> None:
        model = _ready(name, dtype, device)
        self.folded, self.plain = fold(model), split_cat(model)
        self.compiled = torch.compile(self.plain, dynamic=False)
        shape = (batch, 3, SIDE, SIDE)
        self.images = [
            torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
            for _ in range(buffers)
        ]
        self.want = self.plain.double()(self.images[0].double())
        self.plain.to(dtype)

    def ours(self, i: int) -> Tensor:
        return self.folded(self.images[i])

    def eager(self, i: int) -> Tensor:
        return self.plain(self.images[i])

    def compile(self, i: int) -> Tensor:
        return self.compiled(self.images[i])

    def error(self, y: Tensor) -> float:
        """The largest, of the largest output."""
        return float((y.double() - self.want).abs().max() / self.want.abs().max())


def _bytes(name: str, batch: int, size: int) -> int:
    """The images, the weights, and the input of each block."""
    model: PartialNet = getattr(pconv, f"partialnet_{name}")(device="meta")
    weights = sum(p.numel() for p in model.parameters())
    inputs = 3 * SIDE**2
    for stage, depth in zip(model.feature_info, model.depths, strict=True):
        inputs += depth * stage["num_chs"] * (SIDE // stage["reduction"]) ** 2
    return size * (weights + batch * inputs)


def row(name: str, batch: int, dtype: str, device: str) -> Row:
    def build(buffers: int) -> Workload:
        network = Network(name, batch, DTYPES[dtype], device, buffers)
        baselines = {"split_cat": network.eager, "compile": network.compile}
        return Workload(network.ours, baselines, network.error, 1e-5 if dtype == "fp32" else 0.1)

    return Row(
        op="pconv_network",
        shape=f"partialnet-{name} {batch}x3x{SIDE}x{SIDE} nhwc",
        dtype=dtype,
        bytes_read=_bytes(name, batch, DTYPES[dtype].itemsize),
        operations=round(2e9 * COSTS[name]) * batch,
        math=dtype,
        build=build,
        bars={"best": BARS[name]} if device == "cpu" and dtype == "fp32" and name in BARS else {},
        images=batch,
    )


def rows(device: str) -> list[Row]:
    """All six networks on a GPU; on the CPU, where compiling one takes minutes, the two with bars."""
    names, dtype = (tuple(BARS), "fp32") if device == "cpu" else (tuple(COSTS), "bf16")
    return [row(name, batch, dtype, device) for name in names for batch in (1, 32)]
