"""What a call of `generate` tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedModel

from tranche.decode import target

Guarantee = Literal["exact", "up to ties"]


@dataclass(frozen=True)
class Statistics:
    """How a call of `generate` went.

    Attributes:
        guarantee: "exact": the text equals plain decoding with the same arguments token for token, by construction;
            "up to ties": it does unless two tokens are as likely up to rounding.
        reason: why no more than that can be promised; empty under "exact".
        new_tokens: tokens made, of all sequences.
        target_passes: passes of the target model, those over the prompts included.
        tokens_per_pass: tokens that a pass gave a sequence, on average over passes and sequences, prompts left out.
        mean_accepted: how many of them were the drafter's: tokens_per_pass - 1.
        accepted_lengths: how many passes, sequence by sequence, accepted 0, 1, 2, ... of the drafter's tokens.
        tokens_per_second: new_tokens by the whole time.
        seconds: by "prefill", "draft", "verify" (the target's pass and the verification) and "bookkeeping".
        mean_tree_size: nodes of a tree for which passes were made, on average.
        drafter_error: what the drafter raised, after which the call went on without it.
    """

    guarantee: Guarantee
    reason: str = ""
    new_tokens: int = 0
    target_passes: int = 0
    tokens_per_pass: float = 0.0
    mean_accepted: float = 0.0
    accepted_lengths: tuple[int, ...] = ()
    tokens_per_second: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    mean_tree_size: float = 0.0
    drafter_error: str | None = None


def guarantee(model: PreTrainedModel, exact: bool) -> tuple[Guarantee, str]:
    """Which guarantee `generate` gives for this model, and what stands in the way of a better one."""
    if not exact:
        return "up to ties", "exact=False"
    found = target.obstacles(model)
    if not found:
        return "exact", ""
    some = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return "up to ties", f"rows of these modules may depend on the rows beside them: {some}"
