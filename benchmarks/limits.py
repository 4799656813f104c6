"""The limits that rows are held against: our own loops, run again beside each row."""

from __future__ import annotations

import functools
import math

import torch

from benchmarks.timing import ROTATION_LIMIT, Call, Timer, last_level_cache
from tranche.limits import MathKind, limit_math, limit_read


@functools.lru_cache(maxsize=1)
def _pool(device: str, words: int) -> torch.Tensor:
    return torch.ones(words, dtype=torch.int64, device=device)


def reader(device: str, size: int, parts: int) -> Call:
    """A call that reads `size` bytes: of `parts` pieces, or as many as memory is taken for, those that it is told."""
    words = max(size // 64, 1) * 8
    parts = max(2, min(parts, ROTATION_LIMIT // (8 * words)))
    pool = _pool(device, parts * words)

    def call(i: int) -> torch.Tensor:
        first = i % parts * words
        return limit_read(pool[first : first + words])

    return call


def read_limit(device: str, size: int, repeats: int = 5) -> float:
    """Bytes per second at which `size` bytes are read from memory."""
    parts = max(2, -(-4 * last_level_cache(device) // size))
    call, timer = reader(device, size, parts), Timer(device, parts)
    timer.prepare(call)
    return size / min(timer.seconds(call) for _ in range(repeats))


def math_limit(device: str, kind: MathKind, repeats: int = 8) -> float:
    """Operations per second of the best multiply-add loop of this kind."""
    like = torch.empty(0, device=device)
    timer = Timer(device, 1)
    iterations = 1024
    while True:

        def call(_: int, iterations: int = iterations) -> torch.Tensor:
            return limit_math(like, kind, iterations)

        timer.prepare(call)
        operations = float(call(0)[:, 0].sum())
        seconds = min(timer.seconds(call) for _ in range(repeats))
        if seconds > 2e-2:
            return operations / seconds
        iterations *= 2 ** max(1, math.ceil(math.log2(4e-2 / max(seconds, 1e-6))))
