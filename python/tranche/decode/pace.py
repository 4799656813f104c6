"""How many nodes a draft tree should have: what a step costs by their number, and what each of them earns."""

from __future__ import annotations

import time
from bisect import bisect_left

import torch

# Sizes that are told apart; a step of any other size counts for the nearest above.
_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 60, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
_EXPLORE_EVERY = 48  # steps between two of full size
_FORGET = 0.98  # weight of the past in what a node earns, by step
_FAINTEST = 0.05  # trees that what is known counts for at least
_FOLLOW = 0.1  # least weight of the present in what a step costs


class Clock:
    """Moments on the device's own time line, which nobody waits for."""

    def __init__(self, device: torch.device):
        self._on_host = device.type == "cpu"

    def now(self) -> float | torch.cuda.Event:
        """A moment: after all work that was asked of the device before."""
        if self._on_host:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        """From one moment to a later one, both past."""
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return start.elapsed_time(end) * 1e-3
        assert isinstance(start, float) and isinstance(end, float)  # one clock made both
        return end - start


class Pace:
    """Chooses the size that promises the most tokens a second.

    The first n nodes of a tree are a tree themselves, so one step of a large tree tells what all smaller ones would
    have earned: node i earns the rate at which it is accepted, and n nodes earn 1 + the sum over i < n. The cost of
    a step is measured at a few sizes, interpolated between them, and followed from then on.
    """

    def __init__(self, largest: int, forget: float = _FORGET):
        """Sizes from 1 to `largest` nodes; `forget` is the weight of the past in what a node earns, by step."""
        self._forget = forget
        self.sizes = [size for size in _SIZES if size < largest] + [largest]
        # the largest first: it tells what all sizes earn
        self._opening = [size for size in (largest, 8, 8, 1, 24, 24) if size <= largest]
        self._seconds: dict[int, float] = {}
        self._timed: dict[int, int] = {}
        self._accepted = [0.0] * largest
        self._tried = [0.0] * largest
        self._steps = 0

    @property
    def learning(self) -> bool:
        """Whether sizes are still tried out, whatever they promise."""
        return self._steps < len(self._opening)

    def size(self) -> int:
        """Nodes of the next step's trees, root included."""
        self._steps += 1
        if self._steps <= len(self._opening):
            return self._opening[self._steps - 1]
        if self._steps % _EXPLORE_EVERY == 0:
            return self.sizes[-1]
        return self.best()[0]

    def best(self) -> tuple[int, float]:
        """The size that promises the most tokens a second, and how many."""
        best, chosen = 0.0, self.sizes[-1]
        earned, done = 1.0, 1
        for size in self.sizes:
            for node in range(done, size):
                earned += self._accepted[node] / self._tried[node] if self._tried[node] else 0.0
            done = size
            cost = self._cost(size)
            if cost is not None and earned / cost > best:
                best, chosen = earned / cost, size
        return chosen, best

    def _cost(self, size: int) -> float | None:
        known = sorted(self._seconds)
        if not known:
            return None
        at = bisect_left(known, size)
        if at == len(known):
            return self._seconds[known[-1]]
        right = known[at]
        if right == size or at == 0:
            return self._seconds[right]
        left = known[at - 1]
        share = (size - left) / (right - left)
        return (1 - share) * self._seconds[left] + share * self._seconds[right]

    def timed(self, size: int, seconds: float) -> None:
        """A step of trees of `size` nodes took this long."""
        size = self.sizes[bisect_left(self.sizes, size)]
        count = self._timed[size] = self._timed.get(size, 0) + 1
        if count == 1:  # warms up, and stands in until there is another
            self._seconds[size] = seconds
        elif count == 2:
            self._seconds[size] = min(seconds, self._seconds[size])
        else:
            # one interrupted step must not drive a size out for good
            bounded = min(seconds, 2 * self._seconds[size])
            self._seconds[size] += max(1 / (count - 1), _FOLLOW) * (bounded - self._seconds[size])

    def fade(self) -> None:
        """A step went by that told nothing: what is known stays the same, and weighs less against what comes."""
        for node, tried in enumerate(self._tried):
            if tried > _FAINTEST:
                self._accepted[node] *= self._forget
                self._tried[node] *= self._forget

    def earned(self, accepted: list[float], tried: list[float]) -> None:
        """By node, how many trees accepted it since the last call, and in how many of them it stood."""
        for node in range(1, len(self._tried)):
            if node < len(tried) and tried[node] > 0:
                self._accepted[node] = self._forget * self._accepted[node] + accepted[node]
                self._tried[node] = self._forget * self._tried[node] + tried[node]
