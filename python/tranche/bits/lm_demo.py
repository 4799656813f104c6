"""The language model demo: bits per byte of a byte-level Llama at every precision, and what other roundings cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from tranche import byte_llama
from tranche.bits.modules import convert
from tranche.bits.ops import quantize
from tranche.bits.packed import STORED_BITS
from tranche.bits.switch import at_bits

PRECISIONS = (8, 6, 4, 3, 2)
SKIP = ("lm_head",)  # the embedding is no Linear; all between them is converted


def truncated(weight: Tensor, bits: int) -> Tensor:
    """The top bits of the same codes, as they are: what reading fewer planes without a guard bit gives."""
    codes, scale = quantize(weight)
    shift = STORED_BITS - bits
    return ((codes.int() >> shift) << shift).float() * scale[:, None]


def truncated_to_middle(weight: Tensor, bits: int) -> Tensor:
    """Truncated, and read as the middle of the interval that the dropped bits leave (a float, no integer, for them)."""
    codes, scale = quantize(weight)
    shift = STORED_BITS - bits
    middle = (2**shift - 1) / 2
    return (((codes.int() >> shift) << shift) + middle) * scale[:, None]


def one_step(weight: Tensor, bits: int) -> Tensor:
    """Rounded once, to `bits` bits with a scale of its own: a stored weight for each precision."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / top
    return (weight / scale).round().clamp(-top - 1, top) * scale


ROUNDINGS = {
    "truncation": truncated,
    "truncation to the middle": truncated_to_middle,
    "one-step rounding": one_step,
}


@dataclass(frozen=True)
class Findings:
    """Bits per byte: of the model in fp32, and by method and precision."""

    fp32: float
    table: dict[str, dict[int, float]]


@torch.no_grad()
def _with_weights(model: nn.Module, rounding: Callable[[Tensor, int], Tensor], bits: int) -> nn.Module:
    made = copy.deepcopy(model)
    for name, module in made.named_modules():
        if isinstance(module, nn.Linear) and name not in SKIP:
            module.weight.copy_(rounding(module.weight, bits))
    return made


@torch.no_grad()
def run(
    model: nn.Module, text: Tensor, *, windows: int = 32, length: int = 256, progress: bool = True
) -> Findings:
    """Measure a byte-level model in every form.

    Args:
        model: a causal language model of bytes, fp32.
        text: uint8 [bytes], held out.
        windows: how many windows to read.
        length: bytes of each.
        progress: show a bar.
    """

    def measured(some: nn.Module) -> float:
        return byte_llama.bits_per_byte(some, text, windows=windows, length=length)

    table: dict[str, dict[int, float]] = {
        "weight-only": {},
        "integer": {},
        **{name: {} for name in ROUNDINGS},
    }
    switching = {
        "weight-only": convert(copy.deepcopy(model), skip=SKIP),
        "integer": convert(copy.deepcopy(model), skip=SKIP, activation_bits=8),
    }
    cases = [(method, bits) for method in table for bits in PRECISIONS]
    for method, bits in track(cases, "measuring", console=Console(stderr=True), disable=not progress):
        if method in switching:
            with at_bits(switching[method], bits):
                table[method][bits] = measured(switching[method])
        else:
            table[method][bits] = measured(_with_weights(model, ROUNDINGS[method], bits))
    return Findings(measured(model), table)


def show(findings: Findings, console: Console) -> None:
    """The table a person reads."""
    table = Table(title=f"bits per byte of held-out sources; fp32: {findings.fp32:.3f}")
    table.add_column("weights")
    for bits in PRECISIONS:
        table.add_column(f"{bits} bits", justify="right")
    names = {"weight-only": "double rounding, weight-only", "integer": "double rounding, integer activations"}
    for method, by_bits in findings.table.items():
        table.add_row(names.get(method, method), *(f"{by_bits[bits]:.3f}" for bits in PRECISIONS))
    console.print(table)
