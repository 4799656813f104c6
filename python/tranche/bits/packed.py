"""`PackedWeight`: one stored integer weight that serves every precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

STORED_BITS = 8
BITS = range(2, STORED_BITS + 1)
TILE_ROWS, TILE_INPUTS = 16, 32
# Numbers of layouts, as csrc/bits/packed.h has them. A change of the layout takes a new number.
GUARDED_PLANES = 1
SINGLE_PLANES = 2
PLAIN = 16  # plus the bits

Layout = Literal["guarded", "single"]  # what `pack` may be asked for
LAYOUTS: dict[Layout, int] = {"guarded": GUARDED_PLANES, "single": SINGLE_PLANES}


@dataclass(frozen=True)
class PackedWeight:
    """Codes of 8 bits [out_features, in_features] in a kernel's order; docs/bits.md draws it.

    Attributes:
        data: uint8, 512 bytes for each tile of 16 outputs x 32 inputs.
        out_features: rows of the codes.
        in_features: columns of the codes.
        layout: which layout `data` has: GUARDED_PLANES or SINGLE_PLANES, of which l bits read only what they need,
            or PLAIN + l, a copy for l bits alone that `materialize` made.
    """

    data: Tensor
    out_features: int
    in_features: int
    layout: int = GUARDED_PLANES

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        return replace(self, data=self.data.to(device))

    def bytes_read(self, bits: int) -> int:
        """Bytes of `data` that a product at this precision reads."""
        needed = min(bits + 1, STORED_BITS)  # with the guard bit
        if self.layout == SINGLE_PLANES:
            eighths = needed
        elif self.layout == GUARDED_PLANES:
            eighths = min(planes for planes in (3, 5, 7, 8) if planes >= needed)
        else:
            eighths = STORED_BITS
        return self.data.numel() * eighths // 8


def expect_packed(function: str, packed: object) -> None:
    """A TypeError unless `packed` is a PackedWeight. For the slow path: asked once something else has gone wrong."""
    if not isinstance(packed, PackedWeight):
        remedy = "Use bits.pack(codes)." if isinstance(packed, Tensor) else "bits.pack(codes) makes one."
        raise TypeError(
            f"tranche.bits.{function}: expected a PackedWeight, got a {type(packed).__name__}. {remedy}"
        ) from None


torch.export.register_dataclass(PackedWeight, serialized_type_name="tranche.bits.PackedWeight")
