"""What a machine can do at best, by loops that do nothing else; benchmarks run them beside each row."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tranche import _library

MATH_KINDS = ("fp32", "bf16", "int8")
MathKind = Literal["fp32", "bf16", "int8"]


def limit_read(buffer: Tensor) -> Tensor:
    """Read a buffer once, with all threads.

    Args:
        buffer: int64 [words], contiguous, 64-byte aligned, words a multiple of 8.

    Returns:
        int64 [parts], the exclusive or of the words of each consecutive part.

    Raises:
        ValueError: another dtype, shape or alignment.
    """
    return _library.ops().limit_read(buffer)


def limit_math(like: Tensor, kind: MathKind, iterations: int) -> Tensor:
    """Run the machine's best multiply-add on registers, with all threads.

    Args:
        like: any tensor of the device to run on.
        kind: fp32 (fused multiply-add), bf16 or int8 (dot products or matrix tiles).
        iterations: rounds of each chain.

    Returns:
        float64 [parts, 2]: operations done by each part (a multiply-add is two), and a checksum.

    Raises:
        ValueError: an unknown kind, or no iterations.
    """
    if kind not in MATH_KINDS:
        raise ValueError(
            f"tranche.limit_math: expected kind in {MATH_KINDS}, got {kind!r}. Name one of these."
        )
    return _library.ops().limit_math(like, MATH_KINDS.index(kind), iterations)


# The number of parts is the kernel's own affair (threads on the CPU), so fake kernels leave it open.
@_library.register_fake("limit_read")
def _(buffer: Tensor) -> Tensor:
    return buffer.new_empty(torch.library.get_ctx().new_dynamic_size())


@_library.register_fake("limit_math")
def _(like: Tensor, kind: int, iterations: int) -> Tensor:
    return like.new_empty((torch.library.get_ctx().new_dynamic_size(), 2), dtype=torch.float64)
