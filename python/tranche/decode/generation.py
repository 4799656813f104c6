"""`generate`: lossless speculative decoding of transformers models."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tranche.decode import target
from tranche.decode.drafter import Drafter
from tranche.decode.loop import Loop, Settings
from tranche.decode.pace import Pace
from tranche.decode.progress import shown
from tranche.decode.statistics import Statistics, guarantee


@dataclass(frozen=True)
class Output:
    """What `generate` returns.

    Attributes:
        sequences: int64 [B, T + new]: input_ids as they were given, then each sequence's new tokens, padded after its
            end.
        statistics: how it went, and which guarantee was in force.
    """

    sequences: Tensor
    statistics: Statistics


# What steps of a model with a kind of drafter cost and earn, by batch and largest tree: one call learns for the next.
_paces: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple, Pace]] = weakref.WeakKeyDictionary()


def _pace(model: PreTrainedModel, drafter: Drafter, batch: int, tree_size: int) -> Pace:
    known = _paces.setdefault(model, {})
    return known.setdefault((type(drafter), batch, tree_size), Pace(tree_size))


def _check_drafter(drafter: object) -> None:
    remedy = "NgramDrafter()"
    if isinstance(drafter, type):  # it has a drafter's methods, but no drafter's data
        remedy = f"{drafter.__name__}()" if issubclass(drafter, Drafter) else remedy
    elif drafter is None or isinstance(drafter, Drafter):
        return
    raise TypeError(f"tranche.generate: expected a drafter object or None, got {drafter!r}. Use {remedy}.")


def generate(
    model: PreTrainedModel,
    drafter: Drafter | None,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | Literal["model"] | None = "model",
    temperature: Tensor | float = 0.0,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    seed: Tensor | int = 0,
    tree_size: int = 60,
    exact: bool = False,
    progress: bool = False,
    streamer: Any = None,
) -> Output:
    """Continue each prompt, as plain decoding of the model would, in fewer passes of the model.

    Each step the drafter proposes a tree of tokens per sequence, the model scores all its nodes in one pass (tree
    attention over a static cache), and `tranche.tree.verify_sample` keeps the path that the model itself draws: the
    text does not depend on the drafter. Sequences accept different lengths and nothing is re-aligned; each ends by
    itself. Without a drafter the same loop decodes token by token.

    Equality rests on a row of the model having the same bits alone and as a node among others. That holds for models
    whose Linear modules, lm_head included, are `tranche.bits.BitSwitchLinear` (`bits.convert(model, skip=())`), called
    with exact=True; for others it holds up to ties between nearly equal logits. `Output.statistics.guarantee` says so.

    The model is used in eval mode under no_grad with its attention exchanged, and is as before afterwards, also when
    an exception or an interrupt ends the call. It must not be called by others meanwhile.

    Args:
        model: a transformers causal language model with rotary embeddings whose attention goes through
            `AttentionInterface` (Llama, Mistral, Qwen2, Qwen3).
        drafter: who proposes; None decodes plainly.
        input_ids: int64 [B, T], prompts of at least one token.
        attention_mask: [B, T], nonzero where input_ids is a token; padding left or right. All tokens when left out.
        max_new_tokens: the most new tokens of a sequence.
        eos_token_id: tokens that end a sequence (they are part of it); "model" takes the model's, None ends none.
        temperature: a number >= 0 or float32 [B]; 0 is greedy. As `tranche.tree.sample`, and so are the next three.
        top_k: a number >= 0 or int32 [B]; 0 keeps all.
        top_p: a number in [0, 1] or float32 [B].
        seed: int64 [B], or a number: then sequence b has seed + b.
        tree_size: the most nodes of a tree, root included; steps use as many as pay, by measurement.
        exact: compute rows that depend on nothing but themselves, where the model allows it.
        progress: show a progress bar.
        streamer: for one sequence, an object as transformers' streamers are: put(input_ids), then put(new tokens [n])
            as they come, then end().

    Returns:
        `Output`: sequences, int64 [B, T + new], input_ids and what follows them; and statistics of the call.

    Raises:
        TypeError: a model, a drafter or input_ids that is none.
        ValueError: a wrong shape, dtype, device or number; a model that is not supported; prompts that with
            max_new_tokens exceed the positions the model knows.
    """
    target.check_supported(model)
    _check_drafter(drafter)
    settings = Settings.of(
        model, input_ids, attention_mask, max_new_tokens, eos_token_id, temperature, top_k, top_p, seed,
        tree_size if drafter is not None else 1,
    )  # fmt: skip
    if streamer is not None and input_ids.size(0) != 1:
        raise ValueError(
            f"tranche.generate: expected a batch of 1 with a streamer, got {input_ids.size(0)}. Stream one sequence."
        )
    batch = input_ids.size(0)
    if batch == 0 or max_new_tokens == 0:
        return Output(input_ids.clone(), Statistics(*guarantee(model, exact)))

    pace = (
        None
        if drafter is None or getattr(drafter, "chooses_size", False)
        else _pace(model, drafter, batch, tree_size)
    )
    with torch.no_grad(), target.attached(model, exact=exact, capacity=settings.capacity):
        if drafter is not None:
            drafter.prepare(model, batch, settings.capacity, input_ids.device)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        start = time.perf_counter()
        loop = Loop(model, drafter, settings, pace, exact)
        told = 0
        for made in _shown(loop, progress, batch * max_new_tokens):
            if streamer is not None and made > told:
                streamer.put(loop.new_tokens(0)[told:made].cpu())
                told = made
        sequences = loop.sequences(input_ids)
        seconds = time.perf_counter() - start
        if streamer is not None:
            streamer.end()
    return Output(sequences, loop.statistics(seconds, guarantee(model, exact)))


def _shown(loop: Loop, progress: bool, total: int) -> Iterator[int]:
    """The loop's counts of tokens made so far, beside a progress bar if one is wanted."""
    return shown(loop.run(), total) if progress else loop.run()
