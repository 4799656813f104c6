"""Rounding to a grid in floating point, with gradients: what training for several precisions at once is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tranche import _library
from tranche.bits.packed import STORED_BITS


class _FakeQuantize(torch.autograd.Function):
    """The straight-through gradient of w, and that of its scale."""

    @staticmethod
    def forward(w: Tensor, scale: Tensor, bits: int, stored_bits: int) -> Tensor:
        return _library.ops().bits_fake_quantize(w, scale, bits, stored_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        w, scale, *ctx.bits = inputs
        ctx.save_for_backward(w, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        w, scale = ctx.saved_tensors
        ops = _library.ops()
        grad_w, grad_scale = ops.bits_fake_quantize_backward(grad.contiguous(), w, scale, *ctx.bits)
        return grad_w, grad_scale, None, None


class _FakeQuantizeActivations(torch.autograd.Function):
    """Likewise for activations, with one scale and perhaps one zero."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
        return _library.ops().bits_fake_quantize_activations(x, scale, zero, bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, scale, zero, ctx.bits = inputs
        ctx.save_for_backward(x, scale, zero)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, scale, zero = ctx.saved_tensors
        ops = _library.ops()
        grad_x, grad_scale, grad_zero = ops.bits_fake_quantize_activations_backward(
            grad.contiguous(), x, scale, zero, ctx.bits
        )
        return grad_x, grad_scale, grad_zero if zero is not None else None, None


def fake_quantize(w: Tensor, scale: Tensor, bits: int, stored_bits: int = STORED_BITS) -> Tensor:
    """Weights on the grid of `bits` bits, reached by double rounding: W_l * 2^(h-l) * scale.

    W_h = clip(round(w / scale), -2^(h-1), 2^(h-1) - 1) with h = stored_bits, half to even, then
    W_l = min(floor(W_h / 2^(h-l) + 1/2), 2^(l-1) - 1): "Nearly Lossless Adaptive Bit Switching" (arXiv 2502.01199), and
    exactly what `linear` computes with at the same bits once the weight is packed.

    Gradients: to w the identity where neither clip holds, else 0; to a scale the sum over its weights of
    W_l * 2^(h-l) - w / scale where neither clip holds, else W_l * 2^(h-l). The sum's order is fixed.

    Args:
        w: [O, ...], float32, float64, float16 or bfloat16.
        scale: [O], or [O, groups] for a w of [O, I] in groups of I / groups; float32, float64 beside float64.
        bits: 2 to stored_bits.
        stored_bits: 2 to 8.

    Returns:
        [O, ...], of the dtype of w. NaN for NaN; infinite weights are clipped.

    Raises:
        ValueError: a wrong shape, dtype or number of bits.
    """
    flat = w.reshape(w.size(0), -1 if w.numel() else 0).contiguous() if w.dim() != 2 else w.contiguous()
    scale = scale.contiguous()
    if torch.is_grad_enabled() and (w.requires_grad or scale.requires_grad):
        out = _FakeQuantize.apply(flat, scale, bits, stored_bits)
    else:
        out = _library.ops().bits_fake_quantize(flat, scale, bits, stored_bits)
    return out.view(w.shape)


def fake_quantize_activations(x: Tensor, scale: Tensor, bits: int, zero: Tensor | None = None) -> Tensor:
    """Activations on the unsigned grid of `bits` bits: q * scale + zero.

    q = clip(round((x - zero) / scale), 0, 2^bits - 1), the learned activation quantizer of arXiv 2502.01199, which has
    one scale and zero for each precision.

    Gradients: to x the identity where the clip does not hold, else 0; to scale the sum of q - (x - zero) / scale where
    it does not hold, else of q; to zero the sum of 1 where it holds. The sums' order is fixed.

    Args:
        x: any shape, float32, float64, float16 or bfloat16.
        scale: one element; float32, float64 beside float64.
        bits: 1 to 8.
        zero: likewise the smallest value of the grid; 0 when left out.

    Returns:
        As x. NaN for NaN; infinities are clipped.

    Raises:
        ValueError: a wrong shape, dtype or number of bits.
    """
    x = x.contiguous()
    needs_grad = x.requires_grad or scale.requires_grad or (zero is not None and zero.requires_grad)
    if torch.is_grad_enabled() and needs_grad:
        return _FakeQuantizeActivations.apply(x, scale, zero, bits)
    return _library.ops().bits_fake_quantize_activations(x, scale, zero, bits)


# ---- fake kernels -------------------------------------------------------------------------------------------


@_library.register_fake("bits_fake_quantize")
def _(w: Tensor, scale: Tensor, bits: int, stored_bits: int) -> Tensor:
    return torch.empty_like(w)


@_library.register_fake("bits_fake_quantize_backward")
def _(grad: Tensor, w: Tensor, scale: Tensor, bits: int, stored_bits: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w), torch.empty_like(scale)


@_library.register_fake("bits_fake_quantize_activations")
def _(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    return torch.empty_like(x)


@_library.register_fake("bits_fake_quantize_activations_backward")
def _(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)


__all__ = ["fake_quantize", "fake_quantize_activations"]
