"""Rows of `decode`: whole calls of `generate` against plain decoding by the same loop, and the loop's bookkeeping.

The model is the byte-level Llama of `tranche.byte_llama`, widened until every pass reads its weights from memory. It is
trained first where it is not cached, which takes minutes: no row is among the quick ones. The text is a held-out source
file. A row's error is the number of tokens that differ from plain decoding.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from benchmarks.harness import Row, Workload
from benchmarks.wide import wide_head, wide_llama
from tranche import bits
from tranche.decode import (
    BitSwitchDrafter,
    CascadeDrafter,
    Drafter,
    JakiroDrafter,
    NgramDrafter,
    RecyclingDrafter,
    generate,
    target,
)
from tranche.decode.demo import held_out_prompts, mismatches_of
from tranche.decode.loop import Loop
from tranche.decode.settings import Settings
from tranche.tree import Accepted, Tree, verify_sample

PROMPTS, PROMPT, NEW = 16, 128, 48
WEIGHT_BYTES = 309_000_000
HIDDEN = {"bf16": 4, "bits8": 8}  # times the byte-level Llama's width
DRAFTERS = {
    "ngram": NgramDrafter,
    "recycling": RecyclingDrafter,
    "bitswitch4": lambda: BitSwitchDrafter(4),
}
# In bf16 nearly equal logits may fall either way; at 8 bits not a token may differ.
TIES = {"bf16": float("inf"), "bits8": 0.0}
BAR = 1.5


@functools.lru_cache(maxsize=1)
def model_of(dtype: str, device: str) -> PreTrainedModel:
    """309 MB of weights: 155 million in bf16, or 309 million at 8 bits with integer activations."""
    if dtype == "bf16":
        return wide_llama(HIDDEN[dtype], 16).bfloat16().to(device)
    return bits.convert(wide_llama(HIDDEN[dtype], 16).bfloat16(), skip=(), activation_bits=8).to(device)


@functools.lru_cache(maxsize=2)
def head_drafter(dtype: str, device: str) -> Drafter:
    """The demo's head, widened with the model."""
    return JakiroDrafter(wide_head(HIDDEN[dtype]).bfloat16().to(device))


@functools.lru_cache(maxsize=2)
def cascade(dtype: str, device: str) -> Drafter:
    """Learns from call to call what its drafters are worth."""
    return CascadeDrafter([NgramDrafter(), RecyclingDrafter(), head_drafter(dtype, device)])


def maker_of(name: str, dtype: str, device: str) -> Callable[[], Drafter]:
    """Makes the drafter of a call."""
    trained = {"jakiro": head_drafter, "cascade": cascade}
    return functools.partial(trained[name], dtype, device) if name in trained else DRAFTERS[name]


def generate_workload(make: Callable[[], Drafter], dtype: str, device: str) -> Workload:
    """Prompts continued one by one, each by a new drafter that has learned nothing yet."""
    model = model_of(dtype, device)
    prompts = held_out_prompts(PROMPTS, PROMPT).to(device)
    settings = {"max_new_tokens": NEW, "exact": dtype != "bf16", "eos_token_id": None}

    def caller(make):
        turn = itertools.count()

        def call(_):
            row = next(turn) % PROMPTS
            with torch.inference_mode(False):
                return row, generate(model, make(), prompts[row : row + 1], **settings).sequences

        return call

    def error(result):
        row, sequences = result
        with torch.inference_mode(False):
            plain = generate(model, None, prompts[row : row + 1], **settings).sequences
        return float(mismatches_of(sequences, plain))

    ours = caller(make)
    for _ in range(2):  # what passes of each size cost is known from earlier calls
        ours(0)
    return Workload(ours=ours, baselines={"plain": caller(lambda: None)}, error=error, tolerance=TIES[dtype])


def generate_row(name: str, dtype: str, device: str, *, bar: bool = False) -> Row:
    """One drafter against plain decoding."""
    return Row(
        op="decode_generate",
        shape=f"{name} T{PROMPT} +{NEW}",
        dtype=dtype,
        bytes_read=WEIGHT_BYTES,  # once at least
        operations=NEW * 2 * WEIGHT_BYTES,
        math="bf16" if dtype == "bf16" else "int8",
        build=lambda buffers: generate_workload(maker_of(name, dtype, device), dtype, device),
        bars={"plain": BAR} if bar else {},
    )


def bookkeeping_row(dtype: str, device: str, nodes: int = 16) -> Row:
    """Commit, append and end of a ragged batch of 8, against the pass and the verification of the same step."""

    def build(buffers: int) -> Workload:
        model = model_of(dtype, device)
        with torch.inference_mode(False), torch.no_grad():
            prompts = held_out_prompts(8, PROMPT).to(device)
            column = torch.arange(PROMPT, device=device)
            mask = column >= 8 * torch.arange(8, device=device)[:, None]
            settings = Settings.of(model, prompts, mask, NEW, None, 0.0, 0, 1.0, 0, nodes)
            context = target.attached(model, exact=True, capacity=settings.capacity)
            context.__enter__()  # for as long as the process lasts
            loop = Loop(model, None, settings, None, True)
            loop._prefill()
        seqlens = loop._cache.seqlens.clone()
        tokens = torch.randint(256, (8, nodes), device=device)
        tree = Tree.chain(nodes, 8, device)
        length = torch.arange(8, dtype=torch.int32, device=device) % 4  # each sequence accepts its own
        column = torch.arange(nodes, dtype=torch.int32, device=device)
        path = torch.where(column <= length[:, None], column, -1)
        accepted = Accepted(path, length, torch.ones(8, dtype=torch.int64, device=device))

        def step(_):
            with torch.inference_mode(False), torch.no_grad():
                hidden = target.forward(model, loop._cache, tokens, tree, exact=True)
                logits = target.logits_of(model, hidden)
                verify_sample(tokens, tree, logits, temperature=0.0, seed=0, position=seqlens.long() + 1)
            return seqlens + length + 1

        def ours(_):
            with torch.inference_mode(False), torch.no_grad():
                loop._cache.seqlens.copy_(seqlens)
                loop._commit(tokens, accepted, nodes)
            return loop._cache.seqlens

        return Workload(
            ours=ours,
            baselines={"the rest of the step": step},
            error=lambda lengths: float((lengths - seqlens - length - 1).abs().max()),
            tolerance=0.0,
        )

    return Row(
        op="decode_bookkeeping",
        shape=f"B8 N{nodes}",
        dtype=dtype,
        bytes_read=8 * nodes * 8,
        operations=0,
        math="fp32",
        build=build,
        bars={"the rest of the step": 19.0},  # under 5% of a step
    )


def rows(device: str) -> list[Row]:
    """bf16 first, then the exact configuration at 8 bits."""
    return [
        generate_row("ngram", "bf16", device, bar=True),
        generate_row("recycling", "bf16", device),
        generate_row("jakiro", "bf16", device),
        generate_row("cascade", "bf16", device),
        generate_row("ngram", "bits8", device),
        generate_row("recycling", "bits8", device),
        generate_row("bitswitch4", "bits8", device),
        generate_row("jakiro", "bits8", device),
        generate_row("cascade", "bits8", device),
        bookkeeping_row("bits8", device),
    ]
