"""A small language model to try things on: a byte-level Llama, trained on this machine in a few minutes, then cached.

It is an ordinary `transformers.LlamaForCausalLM` whose tokens are bytes; what is built for it works for a real one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from tranche import _cache, corpus
from tranche._extras import needed

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_FORMAT = 1  # of what is cached: to be raised when training or the model changes


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The model's sizes and how it is trained; another recipe is another cached model."""

    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    steps: int = 600
    batch: int = 16
    length: int = 256
    learning_rate: float = 3e-3
    seed: int = 0


def build(recipe: Recipe) -> LlamaForCausalLM:
    """The model of a recipe, with fresh weights, fp32."""
    with needed("tranche.byte_llama", "transformers"):
        from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=8192,
            bos_token_id=None,
            eos_token_id=corpus.END_OF_FILE,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
    )


def load_or_train(
    recipe: Recipe | None = None, *, cache_dir: Path | str | None = None, progress: bool = True
) -> LlamaForCausalLM:
    """The trained model of a recipe: from the cache, or trained now and put there.

    Args:
        recipe: sizes and training; default a model of 3.5 million parameters.
        cache_dir: where models are kept; default `$XDG_CACHE_HOME/tranche`, or `~/.cache/tranche`.
        progress: show a progress bar while it trains.

    Returns:
        The model in fp32 and eval mode.

    Raises:
        ImportError: transformers is not installed.
    """
    with needed("tranche.byte_llama", "transformers"):
        from transformers import LlamaForCausalLM

    recipe = recipe or Recipe()
    home = _cache.folder(cache_dir)
    text = corpus.standard_library("train")
    identity = hashlib.sha256(repr((_FORMAT, recipe)).encode() + text.numpy().tobytes()).hexdigest()[:16]
    path = home / f"byte-llama-{identity}"
    if not path.exists():
        model = build(recipe)
        _train(model, text, recipe, progress)
        with _cache.filled(path) as partial:
            model.save_pretrained(partial)
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _train(model: LlamaForCausalLM, text: Tensor, recipe: Recipe, progress: bool) -> None:
    """Next-byte cross-entropy by AdamW, a warm-up and a cosine; matrix products in bf16."""
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    warm_up = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.1 + 0.45 * (1 + math.cos(math.pi * step / recipe.steps))),
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    columns = (TextColumn("training a byte-level Llama"), BarColumn(), TextColumn("{task.description}"))
    model.train()
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task("", total=recipe.steps)
        for _ in range(recipe.steps):
            start = torch.randint(len(text) - recipe.length, (recipe.batch, 1), generator=generator)
            window = text[start + torch.arange(recipe.length)].long()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=window, labels=window, use_cache=False).loss
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"tranche.byte_llama.load_or_train: the loss became {loss.item()}. "
                    "Lower the recipe's learning rate."
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, description=f"{loss.item() / math.log(2):.2f} bits per byte")
    model.eval()


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module, text: Tensor, *, length: int = 512, batch: int = 8, windows: int = 64
) -> float:
    """How many bits the model needs for a byte of a text: its cross-entropy, in bits.

    Args:
        model: a byte-level causal language model.
        text: uint8 [bytes].
        length: bytes of context; the text is read in windows of that many, spread evenly over it.
        batch: windows at a time.
        windows: how many to read at most.

    Raises:
        ValueError: a text shorter than one window.
    """
    if len(text) <= length:
        raise ValueError(
            f"tranche.byte_llama.bits_per_byte: expected more than length ({length}) bytes, got {len(text)}. "
            "Give a longer text or a smaller length."
        )
    count = min(windows, len(text) // (length + 1))
    starts = torch.linspace(0, len(text) - length - 1, count).long()
    total = 0.0
    for some in starts.split(batch):
        window = text[some[:, None] + torch.arange(length + 1)].long()
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), window[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (count * length) / math.log(2)
