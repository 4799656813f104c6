"""What the family's ops mean, in plain torch and any floating dtype. Slow and clear; the tests' oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from tranche.bits.packed import (
    GUARDED_PLANES,
    LAYOUTS,
    PLAIN,
    SINGLE_PLANES,
    STORED_BITS,
    TILE_INPUTS,
    TILE_ROWS,
    Layout,
    PackedWeight,
)

# The lowest bit of u in each slice, and how many bits it has.
_SLICES = {
    GUARDED_PLANES: ((6, 2), (5, 1), (3, 2), (1, 2), (0, 1)),
    SINGLE_PLANES: tuple((low, 1) for low in range(7, -1, -1)),
}


def quantize(
    weight: Tensor, *, scale: Tensor | None = None, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """See `tranche.bits.quantize`."""
    rows, inputs = weight.shape
    groups = 1 if group_size is None else inputs // group_size
    grouped = weight.float().reshape(rows, groups, inputs // max(groups, 1))
    if scale is None:
        absmax = grouped.abs().amax(2) if grouped.numel() else grouped.new_ones(rows, groups)
        scale = torch.where(absmax == 0, 1.0, absmax / 127)
        scale = scale if group_size is not None else scale[:, 0]
    steps = grouped / scale.float().reshape(rows, groups, 1)
    codes = torch.nan_to_num(steps.round(), nan=0.0).clamp(-128, 127)
    return codes.to(torch.int8).reshape(rows, inputs), scale.float()


def round_bits(codes: Tensor, bits: int) -> Tensor:
    """See `tranche.bits.round_bits`."""
    if bits == STORED_BITS:
        return codes.clone()
    shift = STORED_BITS - bits
    rounded = (codes.to(torch.int32) + (1 << (shift - 1))) >> shift
    return rounded.clamp(max=(1 << (bits - 1)) - 1).to(torch.int8)


def _tiles(codes: Tensor) -> Tensor:
    """u = W + 128 by [row tile, input tile, row, q, s, j], padded with zeros."""
    rows, inputs = codes.shape
    row_tiles, input_tiles = -(-rows // TILE_ROWS), -(-inputs // TILE_INPUTS)
    padded = codes.new_zeros((row_tiles * TILE_ROWS, input_tiles * TILE_INPUTS), dtype=torch.int32)
    padded[:rows, :inputs] = codes.to(torch.int32) + 128
    return padded.view(row_tiles, TILE_ROWS, input_tiles, 2, 4, 4).permute(0, 2, 1, 3, 4, 5)


def pack(codes: Tensor, *, layout: Layout = "guarded") -> PackedWeight:
    """See `tranche.bits.pack`; this is the layouts' definition."""
    u = _tiles(codes)
    s = torch.arange(4, device=codes.device).view(4, 1)
    q = torch.arange(2, device=codes.device).view(2, 1, 1)
    version = LAYOUTS[layout]
    slices = []
    for low, width in _SLICES[version]:
        if width == 2:
            fields = ((u >> low & 3) << (2 * s)).sum(4)  # bytes [.., row, q, j]
            slices.append(fields.permute(0, 1, 3, 2, 4).reshape(-1))
        else:
            slices.append(((u >> low & 1) << (2 * s + q)).sum((3, 4)).reshape(-1))  # bytes [.., row, j]
    return PackedWeight(torch.cat(slices).to(torch.uint8), codes.size(0), codes.size(1), version)


def unpack(packed: PackedWeight, bits: int = STORED_BITS) -> Tensor:
    """See `tranche.bits.unpack`."""
    rows, inputs = packed.out_features, packed.in_features
    row_tiles, input_tiles = -(-rows // TILE_ROWS), -(-inputs // TILE_INPUTS)
    data = packed.data.to(torch.int32)
    if packed.layout == PLAIN + bits:
        u = data.view(row_tiles, input_tiles, 2, 4, TILE_ROWS, 4).permute(0, 1, 4, 2, 3, 5)
    else:
        s = torch.arange(4, device=data.device).view(4, 1)
        q = torch.arange(2, device=data.device).view(2, 1, 1)
        tiles = row_tiles * input_tiles
        u = torch.zeros(row_tiles, input_tiles, TILE_ROWS, 2, 4, 4, dtype=torch.int32, device=data.device)
        start = 0
        for low, width in _SLICES[packed.layout]:
            plane = data[start : start + 64 * width * tiles]
            start += 64 * width * tiles
            if width == 2:
                plane = plane.view(row_tiles, input_tiles, 2, TILE_ROWS, 1, 4).transpose(2, 3)
                u += (plane >> (2 * s) & 3) << low
            else:
                plane = plane.view(row_tiles, input_tiles, TILE_ROWS, 1, 1, 4)
                u += (plane >> (2 * s + q) & 1) << low
    padded = u.permute(0, 2, 1, 3, 4, 5).reshape(row_tiles * TILE_ROWS, input_tiles * TILE_INPUTS)
    codes = (padded - 128)[:rows, :inputs]
    if packed.layout == PLAIN + bits:
        return (codes >> (STORED_BITS - bits)).to(torch.int8)
    return round_bits(codes.to(torch.int8), bits)


def materialize(packed: PackedWeight, bits: int) -> PackedWeight:
    """See `tranche.bits.materialize`."""
    shifted = unpack(packed, bits).to(torch.int32) << (STORED_BITS - bits)
    bytes_ = _tiles(shifted).permute(0, 1, 3, 4, 2, 5)
    data = bytes_.reshape(-1).to(torch.uint8)
    return PackedWeight(data, packed.out_features, packed.in_features, PLAIN + bits)


def dequantize(packed: PackedWeight, scale: Tensor, bits: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """See `tranche.bits.dequantize`."""
    rows, inputs = packed.out_features, packed.in_features
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    shifted = unpack(packed, bits).to(compute) * 2 ** (STORED_BITS - bits)
    groups = scale.reshape(rows, -1).size(1) if rows else 1
    return (
        (shifted.reshape(rows, groups, inputs // groups) * scale.to(compute).reshape(rows, groups, 1))
        .reshape(rows, inputs)
        .to(dtype)
    )


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `tranche.bits.quantize_activations`; fp32 throughout, since codes are decided by its roundings."""
    values = x.float()
    absmax = values.abs().amax(-1, keepdim=True) if x.size(-1) else values.new_zeros((*x.shape[:-1], 1))
    finite = torch.isfinite(absmax)
    safe = torch.where(finite, absmax, 1.0)
    # 127 / tensor would be two roundings: torch multiplies by the reciprocal
    top = torch.full_like(absmax, 127)
    inverse = top / safe.clamp(min=2.0**-100)
    codes = (torch.where(finite, values, 0.0) * inverse).round().clamp(-127, 127).to(torch.int8)
    return codes, torch.where(finite, absmax / top, torch.nan), codes.sum(-1, dtype=torch.int32)


def int_linear(x: Tensor, packed: PackedWeight, bits: int) -> Tensor:
    """See `tranche.bits.int_linear`."""
    return (x.to(torch.int64) @ unpack(packed, bits).to(torch.int64).T).to(torch.int32)


def linear(
    x: Tensor,
    packed: PackedWeight,
    scale: Tensor,
    bits: int,
    bias: Tensor | None = None,
    *,
    activation_bits: int | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """See `tranche.bits.linear`.

    Args:
        compute_dtype: what everything but the quantization of activations is computed in, and the result's dtype.
    """
    weight = dequantize(packed, scale, bits, compute_dtype)
    if activation_bits is None:
        y = x.to(compute_dtype) @ weight.T
    else:
        codes, x_scale, _ = quantize_activations(x)
        y = (codes.to(compute_dtype) @ weight.T) * x_scale.to(compute_dtype)
    return y if bias is None else y + bias.to(compute_dtype)


def fake_quantize(w: Tensor, scale: Tensor, bits: int, stored_bits: int = STORED_BITS) -> Tensor:
    """See `tranche.bits.fake_quantize`; differentiable by autograd, straight through the roundings."""
    rows = w.size(0)
    compute = torch.float64 if w.dtype == torch.float64 else torch.float32
    flat = w.to(compute).reshape(rows, -1 if w.numel() else 0)
    groups = scale.reshape(rows, -1).size(1) if scale.numel() else 1
    factor = scale.to(compute).reshape(rows, groups, 1)
    v = flat.reshape(rows, groups, flat.size(1) // groups) / factor
    half, step = 2 ** (stored_bits - 1), 2 ** (stored_bits - bits)
    # clamp passes gradients inside its bounds only, and NaN stays
    stored = torch.clamp(_straight_through(v, torch.round(v)), -half, half - 1)
    halves = stored / step
    used = _straight_through(halves, torch.floor(halves + 0.5) if step > 1 else halves)
    return (torch.clamp(used, max=2 ** (bits - 1) - 1) * step * factor).reshape(w.shape).to(w.dtype)


def fake_quantize_activations(x: Tensor, scale: Tensor, bits: int, zero: Tensor | None = None) -> Tensor:
    """See `tranche.bits.fake_quantize_activations`; differentiable by autograd."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    factor = scale.to(compute).reshape(())
    offset = torch.zeros_like(factor) if zero is None else zero.to(compute).reshape(())
    v = (x.to(compute) - offset) / factor
    q = torch.clamp(_straight_through(v, torch.round(v)), 0, 2**bits - 1)
    return (q * factor + offset).to(x.dtype)


def _straight_through(v: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, exactly, with the gradient of v."""
    return _Rounded.apply(v, rounded)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, v: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
