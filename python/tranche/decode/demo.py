"""The demo: every drafter on held-out source files, against plain decoding of the same byte-level Llama."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from tranche import bits, byte_llama, corpus
from tranche._extras import require
from tranche.decode.cascade import CascadeDrafter
from tranche.decode.demo_head import load_or_train_head
from tranche.decode.demo_plot import plot_accepted_lengths
from tranche.decode.drafter import Drafter
from tranche.decode.generation import Output, generate
from tranche.decode.jakiro import JakiroDrafter
from tranche.decode.ngram import NgramDrafter
from tranche.decode.recycling import RecyclingDrafter
from tranche.decode.self_drafter import BitSwitchDrafter, LayerSkipDrafter

DRAFTERS: Mapping[str, Callable[[], Drafter]] = {
    "ngram": NgramDrafter,
    "recycling": RecyclingDrafter,
    "layerskip": LayerSkipDrafter,
    "bitswitch": BitSwitchDrafter,
}


@dataclass(frozen=True)
class Row:
    """What the table says of a drafter: sums over all prompts."""

    name: str
    new_tokens: int
    passes: int
    tokens_per_pass: float
    seconds: float
    mismatches: int
    accepted_lengths: tuple[int, ...]


def held_out_prompts(count: int, length: int) -> Tensor:
    """Beginnings from source files that the model was not trained on, int64 [count, length]."""
    text = corpus.standard_library("held_out")
    starts = torch.linspace(0, len(text) - 2 * length, count + 2)[1:-1].long()
    return text[starts[:, None] + torch.arange(length)].long()


def measure(
    name: str,
    model: PreTrainedModel,
    drafter: Drafter | None,
    prompts: Tensor,
    plain: list[Tensor],
    **settings,
) -> tuple[Row, list[Tensor]]:
    """Continue each prompt by itself; compare with plain decoding where that is given."""
    made: list[Output] = []
    seconds = 0.0
    for prompt in track(prompts.split(1), description=f"{name:>10}", transient=True):
        start = time.perf_counter()
        made.append(generate(model, drafter, prompt, **settings))
        seconds += time.perf_counter() - start
    sequences = [output.sequences for output in made]
    mismatches = sum(mismatches_of(a, b) for a, b in zip(sequences, plain, strict=False))
    told = [output.statistics for output in made]
    return (
        Row(
            name=name,
            new_tokens=sum(one.new_tokens for one in told),
            passes=sum(one.target_passes for one in told),
            tokens_per_pass=sum(one.tokens_per_pass for one in told) / len(told),
            seconds=seconds,
            mismatches=mismatches,
            accepted_lengths=tuple(
                sum(counts)
                for counts in itertools.zip_longest(*(one.accepted_lengths for one in told), fillvalue=0)
            ),
        ),
        sequences,
    )


def mismatches_of(one: Tensor, other: Tensor) -> int:
    """Tokens that differ, counting those that only one of the two has."""
    width = min(one.size(1), other.size(1))
    longer = max(one.size(1), other.size(1)) - width
    return int((one[:, :width] != other[:, :width]).sum()) + longer * one.size(0)


def table_of(rows: list[Row], title: str) -> Table:
    """One line a drafter; the first row is plain decoding."""
    plain = rows[0]
    columns = ("drafter", "per pass", "passes", "saved", "tokens/s", "speed", "mismatches")
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "drafter" else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.tokens_per_pass:.2f}",
            str(row.passes),
            f"{1 - row.passes / plain.passes:.0%}",
            f"{row.new_tokens / row.seconds:.0f}",
            f"{plain.seconds / row.seconds:.2f}x",
            str(row.mismatches),
        )
    return table


def demo(
    prompts: int = 6,
    length: int = 256,
    new_tokens: int = 256,
    temperature: float = 0.0,
    plot: Path | str | None = None,
) -> None:
    """Train the byte-level Llama and its draft head (or take them from the cache), and print the table.

    Args:
        prompts: how many held-out sources are continued.
        length: bytes of each that are given.
        new_tokens: bytes of each that are made.
        temperature: 0 is greedy.
        plot: a file for a picture of the accepted lengths.
    """
    console = Console()
    if plot is not None:  # known before the training, not after it
        require("tranche.decode demo --plot", "matplotlib")
    model = byte_llama.load_or_train()
    head = load_or_train_head(model)
    bits.convert(model, skip=())
    texts = held_out_prompts(prompts, length)
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": temperature, "exact": True}
    settings["eos_token_id"] = None  # all run to their full length, so that the columns compare
    generate(model, None, texts[:1], **settings | {"max_new_tokens": 8})  # warms up
    plain, wanted = measure("plain", model, None, texts, [], **settings)
    rows = [plain]
    makers: dict[str, Callable[[], Drafter]] = {
        **DRAFTERS,
        "jakiro": lambda: JakiroDrafter(head),
        "cascade": lambda: CascadeDrafter([NgramDrafter(), RecyclingDrafter(), JakiroDrafter(head)]),
    }
    for name, make in makers.items():
        rows.append(measure(name, model, make(), texts, wanted, **settings)[0])
    parameters = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("data"))
    title = (
        f"A byte-level Llama of {parameters / 1e6:.1f} million weights at 8 bits, {prompts} held-out sources, "
        f"{length} bytes given, {new_tokens} made, {'greedy' if temperature == 0 else f'temperature {temperature}'}"
    )
    console.print(table_of(rows, title))
    if plot is not None:
        console.print(
            f"drew {plot_accepted_lengths({row.name: row.accepted_lengths for row in rows[1:]}, plot)}"
        )
