"""`NgramDrafter`: what followed the last time the text looked like this (prompt lookup decoding)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tranche.decode.chains import tree_of_chains
from tranche.decode.drafter import Context
from tranche.tree import Accepted, Tree

_CHAINS = 6  # earlier places whose continuations are tried at once
_LENGTH = 16  # tokens of a continuation


class NgramDrafter:
    """Proposes the continuations of earlier occurrences of the last n tokens, or of fewer where there are none.

    Places that agree in more tokens come first, and of those the latest. No model, no training.
    """

    def __init__(self, n: int = 3):
        """`n` is the most tokens that are compared.

        Raises:
            ValueError: n < 1.
        """
        if n < 1:
            raise ValueError(f"tranche.NgramDrafter: expected n >= 1, got {n}. Compare at least one token.")
        self.n = n

    def prepare(self, model: PreTrainedModel, batch: int, capacity: int, device: torch.device) -> None:
        """Nothing: all that is known stands in the context."""

    def propose(self, context: Context) -> tuple[Tree, Tensor]:
        """A chain for each of the best earlier places, merged where they begin alike."""
        tokens, last = context.tokens, context.seqlens.long()[:, None]
        positions = torch.arange(tokens.size(1), device=tokens.device)
        # agreement[b, i]: how many tokens that end at i are those that end at the root
        agreement = torch.zeros_like(tokens)
        running = (positions < last).to(tokens.dtype)
        for back in range(self.n):
            wanted = tokens.gather(1, (last - back).clamp(min=0))
            shifted = tokens if back == 0 else tokens.roll(back, 1)
            running = running * ((shifted == wanted) & (positions >= back) & (last >= back))
            agreement += running
        found = (agreement * tokens.size(1) + positions * (agreement > 0)).topk(
            min(_CHAINS, tokens.size(1)), dim=1
        )
        length = min(_LENGTH, max(1, context.tree_size - 1))
        place = found.indices[:, :, None] + 1 + torch.arange(length, device=tokens.device)
        flat = place.clamp(max=tokens.size(1) - 1).flatten(1)
        chains = tokens.gather(1, flat).view(place.shape)
        lengths = (last - found.indices).clamp(max=length) * (found.values > 0)
        return tree_of_chains(chains, lengths, context.tree_size)

    def observe(self, context: Context, accepted: Accepted) -> None:
        """Nothing."""
