"""Fair timing of two callables: interleaved A B B A, on rotating buffers that come from memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[int], object]  # called with the number of the buffer to use
ROTATION_LIMIT = 4 << 30  # bytes that rotating buffers may take


@dataclass(frozen=True)
class Sample:
    """Median and interquartile range of one quantity over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Sample:
        ordered = sorted(values)
        quarter = len(ordered) // 4
        return cls(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache between the device's memory and its processors."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes) or 32 * 2**20


class Timer:
    """Times single calls. On CUDA a call is a captured graph, so that what is timed is the device's work."""

    def __init__(self, device: str, buffers: int):
        self.device = device
        self.buffers = buffers
        # Each call walks through its own buffers: a shared count would show each of two alternating calls half of them.
        self._next: dict[int, int] = {}
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def prepare(self, call: Call) -> None:
        """Warm up, and on CUDA capture the call once per buffer."""
        call(0)
        if self.device != "cuda":
            return
        for index in range(self.buffers):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call(index)
            self._graphs[id(call), index] = graph

    def seconds(self, call: Call, *, rotate: bool = True) -> float:
        """Seconds of one call on the next buffer, or on the same one again."""
        index = self._next.get(id(call), 0)
        if rotate:
            index = self._next[id(call)] = (index + 1) % self.buffers
        if self.device != "cuda":
            start = time.perf_counter()
            call(index)
            return time.perf_counter() - start
        graph = self._graphs[id(call), index]
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def compare(
    timer: Timer, ours: Call, other: Call, repeats: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of ours, seconds of the other, and the ratio other/ours of each pair A B B A."""
    a, b, ratios = [], [], []
    for _ in range(repeats):
        first = timer.seconds(ours)
        second = timer.seconds(other) + timer.seconds(other)
        last = timer.seconds(ours)
        a += [first, last]
        b.append(second / 2)
        ratios.append(second / (first + last))
    return a, b, ratios
