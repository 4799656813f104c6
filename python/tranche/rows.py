"""Rows that depend on nothing but themselves: what stands between a model's matrix products.

torch computes these too, but the bits of a row may change with the rows beside it (the scalar tail of a vector loop,
the number of threads that share a sum). Here they never do, which lossless speculative decoding rests on: a token's
row is the same whether it is decoded alone or as a node of a draft tree.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tranche import _library


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.size(-1))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """The hidden layer of a gated MLP (SwiGLU, arXiv 2002.05202): silu(gate) * up, with silu(x) = x / (1 + exp(-x)).

    Computed in float32 and rounded once. No gradient flows through it.

    Args:
        gate: [..., I], float32, float16 or bfloat16, contiguous in its last dimension.
        up: the same shape and dtype.

    Returns:
        [..., I], contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
    """
    return _library.ops().row_silu_mul(_rows(gate), _rows(up)).view(gate.shape)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square normalisation (arXiv 1910.07467), as Llama rounds it: weight * round(x / sqrt(mean x^2 + eps)).

    The mean is taken in float32; both products are rounded to the dtype of x. No gradient flows through it.

    Args:
        x: [..., H], float32, float16 or bfloat16, contiguous in its last dimension.
        weight: [H], of the dtype of x.
        epsilon: what is added to the mean.

    Returns:
        [..., H], contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or number.
    """
    return _library.ops().row_rms_norm(_rows(x), weight, epsilon).view(x.shape)


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The meaning of `silu_mul` in plain torch, in the dtype of its arguments (float64 included)."""
    return F.silu(gate) * up


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The meaning of `rms_norm` in plain torch, in the dtype of its arguments (float64 included)."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))


@_library.register_fake("row_silu_mul")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@_library.register_fake("row_rms_norm")
def _(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
