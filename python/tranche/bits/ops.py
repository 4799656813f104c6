"""Typed functions of the family; each calls the raw op of flat tensors behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tranche import _library
from tranche.bits import reference
from tranche.bits.packed import (
    GUARDED_PLANES,
    LAYOUTS,
    PLAIN,
    STORED_BITS,
    Layout,
    PackedWeight,
    expect_packed,
)


def quantize(
    weight: Tensor, *, scale: Tensor | None = None, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weights to codes of 8 bits: clip(round(weight / scale), -128, 127), half to even.

    W_h of "Nearly Lossless Adaptive Bit Switching" (arXiv 2502.01199), with h = 8 and no zero point.

    Args:
        weight: [O, I], any floating dtype.
        scale: float32 [O], or [O, I / group_size]; absmax / 127 of each channel or group when left out (1 where
            all weights are zero).
        group_size: inputs that share a scale, a multiple of 32 that divides I; a whole channel when left out.

    Returns:
        codes: int8 [O, I]. Weights with NaN or infinity make their channel's scale non-finite.
        scale: float32, as above.

    Raises:
        ValueError: a wrong shape, dtype or group size.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"tranche.bits.quantize: expected a floating-point weight of shape [O, I], got {weight.dtype} "
            f"{list(weight.shape)}. Flatten it to two dimensions."
        )
    inputs = weight.size(1)
    if group_size is not None and (group_size <= 0 or group_size % 32 or inputs % group_size):
        raise ValueError(
            f"tranche.bits.quantize: expected group_size a multiple of 32 that divides {inputs}, got {group_size}. "
            "Choose such a size, or leave it out for one scale a channel."
        )
    if scale is not None:
        expected = [weight.size(0)] if group_size is None else [weight.size(0), inputs // group_size]
        if list(scale.shape) != expected:
            raise ValueError(
                f"tranche.bits.quantize: expected scale of shape {expected}, got {list(scale.shape)}. "
                "Give each channel, or each group of its inputs, one scale."
            )
    return reference.quantize(weight, scale=scale, group_size=group_size)


def round_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes of 8 bits rounded to `bits`: min((W + 2^(7-bits)) >> (8-bits), 2^(bits-1) - 1), half up.

    W_l of arXiv 2502.01199, always directly from 8 bits: rounding twice gives other codes.

    Args:
        codes: int8, any shape.
        bits: 2 to 8; 8 changes nothing.

    Returns:
        int8 in [-2^(bits-1), 2^(bits-1) - 1], contiguous.

    Raises:
        ValueError: another dtype or number of bits.
    """
    return _library.ops().bits_round(codes, bits)


def pack(codes: Tensor, *, layout: Layout = "guarded") -> PackedWeight:
    """Lay codes out so that a precision reads only its bits (docs/bits.md draws both layouts).

    Args:
        codes: int8 [O, I], contiguous in its last dimension.
        layout: "guarded" planes, where 2, 4, 6 and 8 bits read 3, 5, 7 and 8 eighths of the bytes, and 3, 5 and 7
            bits what the next precision reads; or "single" planes, where l bits read l + 1 eighths (7 bits all), for
            a little more work on each.

    Raises:
        ValueError: another shape, dtype, stride or layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f'tranche.bits.pack: expected layout "guarded" or "single", got {layout!r}. '
            "Leave it out unless 3 or 5 bits are what is used most."
        )
    version = LAYOUTS[layout]
    return PackedWeight(_library.ops().bits_pack(codes, version), codes.size(0), codes.size(1), version)


def _flat(function: str, packed: PackedWeight) -> tuple[Tensor, int, int, int]:
    try:
        return packed.data, packed.out_features, packed.in_features, packed.layout
    except AttributeError:
        expect_packed(function, packed)
        raise


def unpack(packed: PackedWeight, bits: int = STORED_BITS) -> Tensor:
    """The codes at this precision, int8 [O, I].

    Raises:
        ValueError: bits not in 2..8, or a layout that this version does not know.
        TypeError: not a PackedWeight, here as below.
    """
    return _library.ops().bits_unpack(*_flat("unpack", packed), bits)


def materialize(packed: PackedWeight, bits: int) -> PackedWeight:
    """A plain copy for one precision, which kernels read without decoding: a byte a weight, whatever the bits.

    Worth its memory where one precision dominates and many rows are multiplied.

    Raises:
        ValueError: as for `unpack`.
    """
    data = _library.ops().bits_materialize(*_flat("materialize", packed), bits)
    return PackedWeight(data, packed.out_features, packed.in_features, PLAIN + bits)


def dequantize(packed: PackedWeight, scale: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that a precision stands for, [O, I]: W_l * 2^(8-bits) * scale, computed in float32.

    Args:
        packed: the weight.
        scale: float32 [O], or [O, groups].
        bits: 2 to 8.
        dtype: float32, float16 or bfloat16.

    Raises:
        ValueError: a wrong shape, dtype, number of bits or layout.
    """
    data, *layout = _flat("dequantize", packed)
    return _library.ops().bits_dequantize(data, scale, *layout, bits, dtype)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token symmetric codes of 8 bits.

    In float32: scale = absmax / 127, codes = clip(round_half_even(x * (127 / max(absmax, 2^-100))), -127, 127).

    Args:
        x: [..., I], float32, float16 or bfloat16.

    Returns:
        codes: int8 [..., I]. A row of zeros gets zeros and scale 0.
        scale: float32 [..., 1]. NaN, with codes 0, for a row that holds NaN or infinity.
        row_sum: int32 [...], the sums of the codes.

    Raises:
        ValueError: another dtype.
    """
    rows = _rows(x)
    codes, scale, row_sum = _library.ops().bits_quantize_activations(rows)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1), row_sum.view(x.shape[:-1])


def _rows(x: Tensor) -> Tensor:
    """x as [M, I] with contiguous rows, copied only where no view will do."""
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.size(-1))
    return rows if rows.size(1) <= 1 or rows.stride(1) == 1 else rows.contiguous()


def int_linear(x: Tensor, packed: PackedWeight, bits: int) -> Tensor:
    """x times the codes at this precision, exactly: int32 x @ unpack(packed, bits).T.

    Args:
        x: int8 [..., I], I < 2^17.
        packed: the weight [O, I].
        bits: 2 to 8.

    Returns:
        int32 [..., O].

    Raises:
        ValueError: a wrong shape, dtype, number of bits or layout.
    """
    out = _library.ops().bits_int_linear(_rows(x), *_flat("int_linear", packed), bits)
    return out.view(*x.shape[:-1], packed.out_features)


class _Linear(torch.autograd.Function):
    """The product with frozen weights: only x (and bias) get gradients, through the dequantized weight.

    With quantized activations the rounding counts as the identity.
    """

    @staticmethod
    def forward(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
        return _library.ops().bits_linear(x, data, scale, *settings[:4], bias, settings[4])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, data, scale, bias, settings = inputs
        ctx.save_for_backward(data, scale)
        ctx.settings = settings[:4]
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        data, scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _library.ops().bits_dequantize(data, scale, *ctx.settings, grad.dtype)
        if ctx.has_bias and ctx.needs_input_grad[3]:
            grad_bias = grad.sum(0, dtype=torch.float32)
        return grad_x, None, None, grad_bias, None


# Cold, the way from a namespace to its op takes longer than a check of the arguments.
_LINEAR = {name: getattr(torch.ops, name).bits_linear.default for name in _library.NAMESPACES}


def linear(
    x: Tensor,
    packed: PackedWeight,
    scale: Tensor,
    bits: int,
    bias: Tensor | None = None,
    *,
    activation_bits: int | None = None,
) -> Tensor:
    """x @ W.T + bias, W = W_l * 2^(8-bits) * scale read at `bits` bits. Switching bits costs nothing.

    A row's bits do not depend on the other rows or on their number. Gradients flow to x and bias.

    Args:
        x: [..., I], float32, float16 or bfloat16.
        packed: the weight [O, I].
        scale: float32 [O], or [O, groups] for groups of I / groups inputs, a multiple of 32.
        bits: 2 to 8.
        bias: [O], added in float32.
        activation_bits: None keeps x in floating point; 8 quantizes it by row as `quantize_activations` does and
            sums integers (I < 2^17), one sum a group. The result of that is the same on every processor.

    Returns:
        [..., O], of the dtype of x. Rows of x with NaN or infinity give NaN under activation_bits.

    Raises:
        ValueError: a wrong shape, dtype, number of bits or layout.
    """
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    # Once a large weight has passed, this function's own code and data are no longer in any cache, and each lookup
    # waits for memory: it makes no more of them than the call needs.
    rows = x if x.dim() == 2 and x.stride(1) == 1 else _rows(x)
    try:
        if (x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled():
            data, *layout = _flat("linear", packed)
            out = _Linear.apply(rows, data, scale, bias, (*layout, bits, activation_bits))
        else:
            out = _LINEAR[_library.active()](
                rows,
                packed.data,
                scale,
                packed.out_features,
                packed.in_features,
                packed.layout,
                bits,
                bias,
                activation_bits,
            )
    except AttributeError:
        expect_packed("linear", packed)
        raise
    return out if rows is x else out.view(*x.shape[:-1], packed.out_features)


# ---- fake kernels -------------------------------------------------------------------------------------------


@_library.register_fake("bits_round")
def _(codes: Tensor, bits: int) -> Tensor:
    return torch.empty_like(codes, memory_format=torch.contiguous_format)


@_library.register_fake("bits_pack")
def _(codes: Tensor, layout: int = GUARDED_PLANES) -> Tensor:
    tiles = ((codes.size(0) + 15) // 16) * ((codes.size(1) + 31) // 32)
    return codes.new_empty(512 * tiles, dtype=torch.uint8)


@_library.register_fake("bits_unpack")
def _(data: Tensor, out_features: int, in_features: int, layout: int, bits: int) -> Tensor:
    return data.new_empty((out_features, in_features), dtype=torch.int8)


@_library.register_fake("bits_materialize")
def _(data: Tensor, out_features: int, in_features: int, layout: int, bits: int) -> Tensor:
    return torch.empty_like(data)


@_library.register_fake("bits_dequantize")
def _(
    data: Tensor,
    scale: Tensor,
    out_features: int,
    in_features: int,
    layout: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    return data.new_empty((out_features, in_features), dtype=dtype)


@_library.register_fake("bits_quantize_activations")
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format),
        x.new_empty((x.size(0), 1), dtype=torch.float32),
        x.new_empty(x.size(0), dtype=torch.int32),
    )


@_library.register_fake("bits_int_linear")
def _(x: Tensor, data: Tensor, out_features: int, in_features: int, layout: int, bits: int) -> Tensor:
    return x.new_empty((x.size(0), out_features), dtype=torch.int32)


@_library.register_fake("bits_linear")
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    out_features: int,
    in_features: int,
    layout: int,
    bits: int,
    bias: Tensor | None = None,
    activation_bits: int | None = None,
) -> Tensor:
    return x.new_empty((x.size(0), out_features))
