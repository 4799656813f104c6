"""What a benchmark row is, and how one is measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.limits import math_limit, reader
from benchmarks.timing import ROTATION_LIMIT, Call, Sample, Timer, compare, last_level_cache


@dataclass
class Workload:
    """One row ready to run: ours, the baselines, and how to tell that they compute the same thing."""

    ours: Call
    baselines: dict[str, Call]
    error: Callable[[Any], float]  # of a result against the fp64 reference
    tolerance: float
    result: Callable[[Any], Any] = lambda value: value  # of ours and of baselines, in one layout
    layouts: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    on_request: frozenset[str] = frozenset()  # baselines that take long to prepare: run when --vs names them


@dataclass(frozen=True)
class Row:
    """One line of the table before it is measured. `build(buffers)` makes the workload over that many buffers."""

    op: str
    shape: str  # named after a real model
    dtype: str
    bytes_read: int  # that one call cannot do without
    operations: int
    math: str  # which arithmetic limit applies: fp32, bf16 or int8
    build: Callable[[int], Workload]
    bars: dict[str, float] = field(
        default_factory=dict
    )  # baseline -> least ratio; "best" is the best baseline
    least_percent: float | None = None  # of the limit: a bar like the ratios
    quick: bool = False
    images: int = 0  # of one call, where it is of a network
    bytes_written: int = 0  # if they are to count beside those read

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"


@dataclass
class Result:
    """One measured line."""

    family: str
    name: str
    microseconds: float
    spread: tuple[float, float]
    gigabytes_per_second: float
    gigaflops: float
    percent_of_limit: float
    bound: str
    error: float
    ratios: dict[str, tuple[float, float, float]]
    bars: dict[str, float]
    command: str
    least_percent: float | None = None
    warm_microseconds: float | None = None
    images_per_second: float | None = None

    def missed_bars(self) -> list[str]:
        missed = []
        for baseline, bar in self.bars.items():
            ratios = (
                self.ratios if baseline == "best" else {baseline: self.ratios.get(baseline, (math.nan,) * 3)}
            )
            got = min((ratio[0] for ratio in ratios.values()), default=math.nan)
            if not got >= bar:
                missed.append(f"{self.name}: {got:.2f}x {baseline}, the bar is {bar:g}x")
        if self.least_percent is not None and not self.percent_of_limit >= self.least_percent:
            missed.append(
                f"{self.name}: {self.percent_of_limit:.0f}% of its limit ({self.bound}), "
                f"the bar is {self.least_percent:g}%"
            )
        return missed


def measure(row: Row, family: str, device: str, wanted: set[str] | None, repeats: int) -> Result:
    """Check, then time one row against its baselines and the machine's limits."""
    rotation = min(4 * last_level_cache(device), ROTATION_LIMIT)
    buffers = max(2, math.ceil(rotation / max(row.bytes_read, 1)))
    buffers = min(buffers, 512)
    torch.manual_seed(0)  # a check that fails can be looked into
    workload = row.build(buffers)
    error = workload.error(workload.result(workload.ours(0)))
    if not error <= workload.tolerance:
        raise AssertionError(
            f"{row.name}: error {error:.3g} exceeds {workload.tolerance:.3g}; nothing was timed"
        )
    timer = Timer(device, buffers)
    timer.prepare(workload.ours)

    ours: list[float] = []
    ratios: dict[str, tuple[float, float, float]] = {}
    for name, call in workload.baselines.items():
        if name not in (wanted if wanted is not None else workload.baselines.keys() - workload.on_request):
            continue
        layout = workload.layouts.get(name, workload.result)
        difference = workload.error(layout(call(0)))
        if not difference <= 10 * workload.tolerance:
            raise AssertionError(
                f"{row.name}: baseline {name} computes something else (error {difference:.3g})"
            )
        timer.prepare(call)
        seconds, _, pairs = compare(timer, workload.ours, call, repeats)
        ours += seconds
        sample = Sample.of(pairs)
        ratios[name] = (sample.median, sample.low, sample.high)
    moved = row.bytes_read + row.bytes_written
    read = reader(device, moved, buffers)
    timer.prepare(read)
    # Between two calls of ours, as a baseline is: memory's speed changes from one second to the next.
    seconds, _, pairs = compare(timer, workload.ours, read, repeats)
    ours += seconds
    percent_of_memory = 100 * Sample.of(pairs).median
    warm = None
    if device == "cuda":
        warm = (
            1e6 * Sample.of([timer.seconds(workload.ours, rotate=False) for _ in range(2 * repeats)]).median
        )

    sample = Sample.of(ours)
    percent_of_math = 100 * row.operations / math_limit(device, row.math) / sample.median
    return Result(
        family=family,
        name=row.name,
        microseconds=1e6 * sample.median,
        spread=(1e6 * sample.low, 1e6 * sample.high),
        gigabytes_per_second=moved / sample.median / 1e9,
        gigaflops=row.operations / sample.median / 1e9,
        percent_of_limit=max(percent_of_memory, percent_of_math),
        bound="memory" if percent_of_memory >= percent_of_math else "arithmetic",
        error=error,
        ratios=ratios,
        bars=row.bars,
        command=f"python -m benchmarks {family} --device {device} --only '^{_pattern(row.name)}$'",
        least_percent=row.least_percent,
        warm_microseconds=warm,
        images_per_second=row.images / sample.median if row.images else None,
    )


def _pattern(name: str) -> str:
    """A regular expression for one name; spaces and hyphens need no escape, whatever `re.escape` does."""
    return re.escape(name).replace("\\ ", " ").replace("\\-", "-")


def run(
    rows: dict[str, Iterable[Row]], device: str, wanted: set[str] | None, quick: bool, only: str | None
) -> list[Result]:
    """Measure the rows asked for of each family, behind a progress bar."""
    chosen = [
        (family, row)
        for family, some in rows.items()
        for row in some
        if (not quick or row.quick) and (only is None or re.search(only, row.name))
    ]
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(chosen))
        for family, row in chosen:
            progress.update(task, description=row.name)
            results.append(measure(row, family, device, wanted, repeats=7 if quick else 15))
            progress.advance(task)
    return results
