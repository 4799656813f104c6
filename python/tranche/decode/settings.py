"""The arguments of `generate`, checked and brought into the form that the loop works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tranche.decode import target


def _expect(holds: bool, expected: str, got: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"tranche.generate: expected {expected}, got {got}. {remedy}")


def _by_row(
    name: str, value: Tensor | float, dtype: torch.dtype, low: float, high: float, like: Tensor
) -> Tensor:
    """A number, or one for each sequence, as a tensor [B]."""
    batch = like.size(0)
    if isinstance(value, Tensor):
        _expect(
            value.shape == (batch,),
            f"{name} a number or of shape [{batch}]",
            list(value.shape),
            "One a sequence.",
        )
        rows = value.to(like.device, dtype)
    else:
        rows = torch.full((batch,), value, dtype=dtype, device=like.device)
    bad = rows[~((rows >= low) & (rows <= high))]
    _expect(bad.numel() == 0, f"{name} in [{low}, {high}]", bad[:1].tolist(), "See tranche.tree.sample.")
    return rows


def _end_tokens(model: PreTrainedModel, given: int | Sequence[int] | str | None) -> list[int]:
    if given == "model":
        generation = getattr(model, "generation_config", None)
        given = getattr(generation, "eos_token_id", None)
        given = model.config.get_text_config().eos_token_id if given is None else given
    if given is None:
        return []
    if isinstance(given, str):
        raise ValueError(
            f"tranche.generate: expected eos_token_id 'model', a token, tokens or None, got {given!r}. Give its number."
        )
    return [given] if isinstance(given, int) else [int(token) for token in given]


def _padding(model: PreTrainedModel, ends: list[int]) -> int:
    for source in (getattr(model, "generation_config", None), model.config.get_text_config()):
        token = getattr(source, "pad_token_id", None)
        if token is not None and token >= 0:
            return token
    return ends[0] if ends else 0


@dataclass(frozen=True)
class Settings:
    """What a loop is about.

    Attributes:
        tokens: int64 [B, capacity + 2], the prompts without padding, and room for what follows. The last column
            takes what has no place.
        lengths: int32 [B], of the prompts.
        longest: the longest of them.
        max_new_tokens: as `generate`'s.
        end_tokens: int64 [E].
        padding: the token that stands after a sequence's end.
        temperature: float32 [B]; top_k int32 [B]; top_p float32 [B]; seed int64 [B].
        top_k: see `temperature`.
        top_p: see `temperature`.
        seed: see `temperature`.
        tree_size: the most nodes of a tree.
        capacity: slots of the cache: prompt, new tokens, and a tree behind them.
    """

    tokens: Tensor
    lengths: Tensor
    longest: int
    max_new_tokens: int
    end_tokens: Tensor
    padding: int
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    tree_size: int
    capacity: int

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | str | None,
        temperature: Tensor | float,
        top_k: Tensor | int,
        top_p: Tensor | float,
        seed: Tensor | int,
        tree_size: int,
    ) -> Settings:
        """Check everything that can be known before the first pass."""
        if not isinstance(input_ids, Tensor):
            raise TypeError(
                f"tranche.generate: expected input_ids int64 of shape [B, T], got a {type(input_ids).__name__}. "
                "Give a tensor: torch.tensor([[1, 2]]), or tokenizer(prompts, return_tensors='pt').input_ids."
            )
        _expect(
            input_ids.dim() == 2 and input_ids.dtype == torch.int64,
            "input_ids int64 of shape [B, T]",
            f"{input_ids.dtype} {list(input_ids.shape)}",
            "Tokenize a list of prompts.",
        )
        _expect(
            input_ids.device == model.device,
            f"input_ids on the model's device ({model.device})",
            input_ids.device,
            "Move it with input_ids.to(model.device).",
        )
        _expect(max_new_tokens >= 0, "max_new_tokens >= 0", max_new_tokens, "Ask for at least no token.")
        _expect(1 <= tree_size <= 1024, "tree_size in [1, 1024]", tree_size, "60 is a good size.")
        vocabulary = target.vocabulary(model)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        _expect(
            attention_mask.shape == input_ids.shape,
            f"attention_mask of input_ids' shape {list(input_ids.shape)}",
            list(attention_mask.shape),
            "It comes with input_ids from the tokenizer.",
        )
        used = attention_mask.to(input_ids.device) != 0
        lengths = used.sum(1)
        batch = input_ids.size(0)
        shortest, longest = (int(lengths.min()), int(lengths.max())) if batch else (1, 1)
        _expect(shortest >= 1, "prompts of at least one token", "an empty one", "Begin with a start token.")
        known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        _expect(
            known is None or longest + max_new_tokens <= known,
            f"prompt + max_new_tokens <= {known}, the positions the model knows",
            f"{longest} + {max_new_tokens}",
            "Shorten the prompt or ask for fewer tokens.",
        )
        bad = input_ids[used & ((input_ids < 0) | (input_ids >= vocabulary))]
        _expect(
            bad.numel() == 0,
            f"input_ids in [0, {vocabulary})",
            bad[:1].tolist(),
            "Use the model's tokenizer.",
        )

        capacity = longest + max_new_tokens + tree_size
        tokens = input_ids.new_zeros(batch, capacity + 2)
        # A stable sort moves the padding behind the tokens, on whichever side it was.
        order = torch.sort((~used).to(torch.int8), dim=1, stable=True).indices
        packed = input_ids.gather(1, order)[:, :longest]
        real = torch.arange(longest, device=input_ids.device) < lengths[:, None]
        tokens[:, :longest] = torch.where(real, packed, 0)

        ends = _end_tokens(model, eos_token_id)
        rows = input_ids
        if not isinstance(seed, Tensor):
            seed = torch.arange(batch, device=input_ids.device) + seed
        limit = float("inf")
        return cls(
            tokens=tokens,
            lengths=lengths.to(torch.int32),
            longest=longest,
            max_new_tokens=max_new_tokens,
            end_tokens=torch.tensor(ends, dtype=torch.int64, device=input_ids.device),
            padding=_padding(model, ends),
            temperature=_by_row(
                "temperature", temperature, torch.float32, 0.0, torch.finfo(torch.float32).max, rows
            ),
            top_k=_by_row("top_k", top_k, torch.int32, 0, limit, rows),
            top_p=_by_row("top_p", top_p, torch.float32, 0.0, 1.0, rows),
            seed=_by_row("seed", seed, torch.int64, -limit, limit, rows),
            tree_size=tree_size,
            capacity=capacity,
        )
