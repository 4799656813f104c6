"""Learned grids of activations: one scale and zero for each precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tranche.bits.fake_quantize import fake_quantize_activations


class LearnedActivations(nn.Module):
    """An unsigned grid of b bits for each precision b, its scale and zero learned.

    Attributes:
        scale, zero: parameters [precisions]. They are 1 and 0 until `calibrate` has seen data.
        calibrating: take scale and zero from the next input at each precision.
    """

    def __init__(self, precisions: Sequence[int]):
        super().__init__()
        self.precisions = tuple(precisions)
        self.scale = nn.Parameter(torch.ones(len(self.precisions)))
        self.zero = nn.Parameter(torch.zeros(len(self.precisions)))
        self.calibrating = False

    def _of(self, bits: int) -> tuple[Tensor, Tensor]:
        if bits not in self.precisions:
            raise ValueError(
                f"tranche.bits.LearnedActivations: expected bits in {list(self.precisions)}, got {bits}. "
                "Name every precision to be used in prepare_qat(precisions=...)."
            )
        i = self.precisions.index(bits)
        return self.scale[i], self.zero[i]

    @torch.no_grad()
    def _calibrate(self, x: Tensor, bits: int) -> None:
        # the start of LSQ (arXiv 1902.08153), above the smallest value
        i = self.precisions.index(bits)
        zero = x.min()
        self.zero[i] = zero
        self.scale[i] = (2 * (x - zero).mean() / (2**bits - 1) ** 0.5).clamp(min=1e-6)

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """X on the grid of `bits` bits, with gradients."""
        if self.calibrating:
            self._calibrate(x, bits)
        scale, zero = self._of(bits)
        return fake_quantize_activations(x, scale, bits, zero)

    @torch.no_grad()
    def codes(self, x: Tensor, bits: int) -> Tensor:
        """The grid's points less 2^(bits-1), as int8, for integer products."""
        scale, zero = self._of(bits)
        q = torch.round((x.float() - zero) / scale).nan_to_num(0.0).clamp(0, 2**bits - 1)
        return (q - 2 ** (bits - 1)).to(torch.int8)

    @torch.no_grad()
    def grid(self, bits: int) -> tuple[Tensor, Tensor]:
        """(step, offset): a code c stands for c * step + offset."""
        scale, zero = self._of(bits)
        return scale, zero + scale * 2 ** (bits - 1)


__all__ = ["LearnedActivations"]
