"""`Accepted`: what verification keeps of a batch of draft trees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accepted:
    """The accepted path of B trees of at most N nodes.

    Attributes:
        path: int32 [B, N]; accepted nodes from the root (path[:, 0] = 0) in ascending order, padded with -1.
        length: int32 [B]; accepted draft tokens, without the root.
        next_token: int64 [B]; the target's token after the last accepted node.
    """

    path: Tensor
    length: Tensor
    next_token: Tensor


torch.export.register_dataclass(Accepted, serialized_type_name="tranche.tree.Accepted")
