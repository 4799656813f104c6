"""What a benchmark row is, how one is measured, and how results are shown, kept and compared."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.limits import math_limit, read_limit
from benchmarks.timing import Call, Sample, Timer, compare, last_level_cache


@dataclass
class Workload:
    """One row ready to run: ours, the baselines, and how to tell that they compute the same thing."""

    ours: Call
    baselines: dict[str, Call]
    error: Callable[[Any], float]  # of a result against the fp64 reference
    tolerance: float
    result: Callable[[Any], Any] = lambda value: value  # of ours and of baselines, in one layout
    layouts: dict[str, Callable[[Any], Any]] = field(default_factory=dict)


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
    quick: bool = False
    bytes_written: int = 0  # if they are to count beside those read

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"


@dataclass
class Result:
    """One measured line."""

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
    warm_microseconds: float | None = None

    def missed_bars(self) -> list[str]:
        missed = []
        for baseline, bar in self.bars.items():
            ratios = (
                self.ratios if baseline == "best" else {baseline: self.ratios.get(baseline, (math.nan,) * 3)}
            )
            got = min((ratio[0] for ratio in ratios.values()), default=math.nan)
            if not got >= bar:
                missed.append(f"{self.name}: {got:.2f}x {baseline}, the bar is {bar:g}x")
        return missed


ROTATION_LIMIT = 4 << 30  # bytes that rotating buffers may take


def measure(row: Row, device: str, wanted: set[str] | None, repeats: int) -> Result:
    """Check, then time one row against its baselines and the machine's limits."""
    rotation = min(4 * last_level_cache(device), ROTATION_LIMIT)
    buffers = max(2, math.ceil(rotation / max(row.bytes_read, 1)))
    buffers = min(buffers, 512)
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
        if wanted is not None and name not in wanted:
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
    if not ours:
        ours = [timer.seconds(workload.ours) for _ in range(2 * repeats)]
    warm = None
    if device == "cuda":
        warm = (
            1e6 * Sample.of([timer.seconds(workload.ours, rotate=False) for _ in range(2 * repeats)]).median
        )

    sample = Sample.of(ours)
    moved = row.bytes_read + row.bytes_written
    read_seconds = moved / read_limit(device, moved)
    math_seconds = row.operations / math_limit(device, row.math)
    return Result(
        name=row.name,
        microseconds=1e6 * sample.median,
        spread=(1e6 * sample.low, 1e6 * sample.high),
        gigabytes_per_second=moved / sample.median / 1e9,
        gigaflops=row.operations / sample.median / 1e9,
        percent_of_limit=100 * max(read_seconds, math_seconds) / sample.median,
        bound="memory" if read_seconds >= math_seconds else "arithmetic",
        error=error,
        ratios=ratios,
        bars=row.bars,
        command=f"python -m benchmarks {row.op.split('_')[0]} --device {device} --only '{row.name}'",
        warm_microseconds=warm,
    )


def run(
    rows: Iterable[Row], device: str, wanted: set[str] | None, quick: bool, only: str | None
) -> list[Result]:
    """Measure the rows asked for, behind a progress bar."""
    chosen = [row for row in rows if (not quick or row.quick) and (only is None or re.search(only, row.name))]
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(chosen))
        for row in chosen:
            progress.update(task, description=row.name)
            results.append(measure(row, device, wanted, repeats=7 if quick else 15))
            progress.advance(task)
    return results


def show(results: list[Result], console: Console) -> None:
    """The table a person reads."""
    table = Table(show_lines=True)
    for title in ("row", "us (quartiles)", "GB/s", "GFLOP/s", "% of limit", "error", "times each baseline"):
        table.add_column(title, no_wrap=True)
    for r in results:
        ratios = "\n".join(f"{v[0]:.2f} {name} ({v[1]:.2f}..{v[2]:.2f})" for name, v in r.ratios.items())
        warm = "" if r.warm_microseconds is None else f"\nwarm {r.warm_microseconds:.1f}"
        op, _, shape = r.name.partition(" ")
        table.add_row(
            f"{op}\n{shape}",
            f"{r.microseconds:.1f} ({r.spread[0]:.1f}..{r.spread[1]:.1f}){warm}",
            f"{r.gigabytes_per_second:.1f}",
            f"{r.gigaflops:.0f}",
            f"{r.percent_of_limit:.0f}% {r.bound}",
            f"{r.error:.1e}",
            ratios,
        )
    console.print(table)
    if results:
        console.print(f"One row alone: {results[0].command}", highlight=False)


def machine(device: str) -> dict[str, str]:
    """What the results are results of."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "threads": str(torch.get_num_threads())}


def save(results: list[Result], device: str, path: Path) -> None:
    """Keep results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(device), "rows": [asdict(r) for r in results]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def slower_than(results: list[Result], path: Path, fail_above: float) -> list[str]:
    """Rows that take longer than in an earlier file by more than the fraction `fail_above`."""
    before = {row["name"]: row["microseconds"] for row in json.loads(path.read_text())["rows"]}
    complaints = []
    for r in results:
        if r.name in before and r.microseconds > before[r.name] * (1 + fail_above):
            complaints.append(f"{r.name}: {r.microseconds:.1f} us, was {before[r.name]:.1f} us")
    return complaints
