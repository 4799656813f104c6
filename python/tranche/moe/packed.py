"""`PackedExperts`: a stack of experts' matrices in the layout of `tranche.bits`, which serves every precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tranche.bits import PackedWeight, pack, quantize
from tranche.bits.packed import GUARDED_PLANES


@dataclass(frozen=True)
class PackedExperts:
    """Codes of 8 bits [E, out_features, in_features], each expert's packed as `tranche.bits.pack` does, and scales.

    Attributes:
        data: uint8 [E, bytes]; a row is the `data` of a PackedWeight.
        scale: float32 [E, out_features].
        out_features: rows of an expert's codes.
        in_features: columns of an expert's codes.
        layout: of `data`; fused_experts takes GUARDED_PLANES.
    """

    data: Tensor
    scale: Tensor
    out_features: int
    in_features: int
    layout: int = GUARDED_PLANES

    @property
    def num_experts(self) -> int:
        """E."""
        return self.data.size(0)

    def expert(self, index: int) -> PackedWeight:
        """One of them, as the functions of `tranche.bits` take it; its scale is `scale[index]`."""
        return PackedWeight(self.data[index], self.out_features, self.in_features, self.layout)

    def to(self, device: torch.device | str) -> PackedExperts:
        """The same experts on another device."""
        return replace(self, data=self.data.to(device), scale=self.scale.to(device))


def pack_experts(weight: Tensor, scale: Tensor | None = None) -> PackedExperts:
    """Quantize a stack of matrices by output channel, as `tranche.bits.quantize` does, and pack it.

    Args:
        weight: [E, O, I], any floating dtype; or int8 codes, with their scales.
        scale: float32 [E, O]; absmax / 127 of each channel when left out.

    Raises:
        ValueError: a wrong shape or dtype, or codes without scales.
    """
    if weight.dim() != 3 or not (weight.is_floating_point() or weight.dtype == torch.int8):
        raise ValueError(
            "tranche.moe.pack_experts: expected weight [E, O, I], floating-point or int8, got "
            f"{list(weight.shape)} of {weight.dtype}. Stack the experts' matrices."
        )
    experts, outputs, inputs = weight.shape
    if (weight.dtype == torch.int8 and scale is None) or (
        scale is not None and list(scale.shape) != [experts, outputs]
    ):
        raise ValueError(
            f"tranche.moe.pack_experts: expected scale of shape {[experts, outputs]}, got "
            f"{'none' if scale is None else list(scale.shape)}. Each output of an expert has its scale."
        )
    tiles = -(-outputs // 16) * -(-inputs // 32)
    data = weight.new_empty((experts, 512 * tiles), dtype=torch.uint8)
    scales = weight.new_empty((experts, outputs), dtype=torch.float32)
    for e in range(experts):
        if scale is not None and weight.dtype == torch.int8:
            codes, scales[e] = weight[e], scale[e]
        else:
            codes, scales[e] = quantize(weight[e], scale=None if scale is None else scale[e])
        data[e] = pack(codes).data
    return PackedExperts(data, scales, outputs, inputs)


torch.export.register_dataclass(PackedExperts, serialized_type_name="tranche.moe.PackedExperts")
