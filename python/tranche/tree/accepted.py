"""`Accepted`: what the verification of a draft tree keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accepted:
    """The accepted path of each of B trees of at most N nodes.

    Attributes:
        path: int32 [B, N]; the accepted nodes from the root on, path[:, 0] = 0, padded with -1. All -1 where the
            tree has no nodes.
        length: int32 [B]; accepted draft tokens, without the root.
        next_token: int64 [B]; the target's token after the last accepted node; -1 where the tree has no nodes.
    """

    path: Tensor
    length: Tensor
    next_token: Tensor


torch.export.register_dataclass(Accepted, serialized_type_name="tranche.tree.Accepted")
