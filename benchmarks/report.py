"""How results are shown, kept and compared."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Result
from tranche.__main__ import build_rows

ROOT = Path(__file__).parent.parent


def show(results: list[Result], console: Console) -> None:
    """The table a person reads."""
    table = Table(show_lines=True)
    for title in ("row", "us (quartiles)", "GB/s", "GFLOP/s", "% of limit", "error", "times each baseline"):
        table.add_column(title, no_wrap=True)
    for r in results:
        ratios = "\n".join(f"{v[0]:.2f} {name} ({v[1]:.2f}..{v[2]:.2f})" for name, v in r.ratios.items())
        warm = "" if r.warm_microseconds is None else f"\nwarm {r.warm_microseconds:.1f}"
        images = "" if r.images_per_second is None else f"\n{r.images_per_second:.1f} images/s"
        op, _, shape = r.name.partition(" ")
        table.add_row(
            f"{op}\n{shape}",
            f"{r.microseconds:.1f} ({r.spread[0]:.1f}..{r.spread[1]:.1f}){warm}{images}",
            f"{r.gigabytes_per_second:.1f}",
            f"{r.gigaflops:.0f}",
            f"{r.percent_of_limit:.0f}% {r.bound}",
            f"{r.error:.1e}",
            ratios,
        )
    console.print(table)
    for line in noisy(results):
        console.print(line, highlight=False)
    if results:
        console.print(f"One row alone: {results[0].command}", highlight=False)


def noisy(results: list[Result]) -> list[str]:
    """What is to be said of rows that something else disturbed, or whose limit was."""
    return [
        f"{r.name}: noisy: close other programs and run it again"
        for r in results
        if r.spread[1] > 2 * r.spread[0] or r.percent_of_limit > 115
    ]


def machine(device: str) -> dict[str, str]:
    """What the results are results of."""
    about = dict(build_rows())
    about.pop("build", None)
    name = torch.cuda.get_device_name(0) if device == "cuda" else _processor()
    return {"device": name, "threads": str(torch.get_num_threads()), **about, "commit": _commit()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} processors"


def _commit() -> str:
    """The commit that was measured, marked when files differ from it."""
    git = ("git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=, changed")
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def significant(value: Any) -> Any:
    """The same with every float in it rounded to four digits: more would say what was not measured."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: significant(inner) for key, inner in value.items()}
    return [significant(inner) for inner in value] if isinstance(value, list | tuple) else value


def save(results: list[Result], device: str, path: Path) -> None:
    """Keep results as JSON, a line for each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(significant(asdict(r))) for r in results)
    path.write_text(f'{{"machine": {json.dumps(machine(device))},\n"rows": [\n{rows}\n]}}\n')


def load(path: Path) -> tuple[dict[str, str], list[Result]]:
    """The machine and the results that `save` kept."""
    document = json.loads(path.read_text())
    names = {f.name for f in fields(Result)}
    rows = [Result(**{key: value for key, value in row.items() if key in names}) for row in document["rows"]]
    return document["machine"], rows


def slower_than(results: list[Result], path: Path, fail_above: float) -> list[str]:
    """Rows that take longer than in an earlier file by more than the fraction `fail_above`."""
    before = {r.name: r.microseconds for r in load(path)[1]}
    complaints = []
    for r in results:
        if r.name in before and r.microseconds > before[r.name] * (1 + fail_above):
            complaints.append(f"{r.name}: {r.microseconds:.1f} us, was {before[r.name]:.1f} us")
    return complaints


def markdown_table(results: list[Result]) -> str:
    """Rows as Markdown, each with its median and quartiles, its limit, and its baselines."""
    lines = [
        "| row | us (quartiles) | GB/s | GFLOP/s | of its limit | error | times each baseline (quartiles) |",
        "| --- | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    for r in results:
        ratios = ", ".join(f"{v[0]:.2f} {name} ({v[1]:.2f}..{v[2]:.2f})" for name, v in r.ratios.items())
        images = "" if r.images_per_second is None else f", {r.images_per_second:.1f} images/s"
        lines.append(
            f"| {r.name} | {r.microseconds:.0f} ({r.spread[0]:.0f}..{r.spread[1]:.0f}){images} "
            f"| {r.gigabytes_per_second:.1f} | {r.gigaflops:.0f} | {r.percent_of_limit:.0f}% ({r.bound}) "
            f"| {r.error:.1e} | {ratios or '-'} |"
        )
    return "\n".join(lines) + "\n"


def markdown_summary(results: list[Result], about: dict[str, str]) -> str:
    """One page: what was measured on what, and for each family its rows against the best of their baselines."""
    lines = ["# Microbenchmarks of tranche", ""]
    lines += [f"* {key}: {value}" for key, value in about.items()]
    lines += ["", "Times the best baseline of the row; the tables of all baselines follow.", ""]
    lines += [
        "| family | rows | least | median | most | rows below a bar |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    below: list[str] = []
    for family in dict.fromkeys(r.family for r in results):
        rows = [r for r in results if r.family == family]
        best = sorted(min(v[0] for v in r.ratios.values()) for r in rows if r.ratios)
        span = f"{best[0]:.2f} | {best[len(best) // 2]:.2f} | {best[-1]:.2f}" if best else "- | - | -"
        missed = [text for r in rows for text in r.missed_bars()]
        below += missed
        lines.append(f"| {family} | {len(rows)} | {span} | {len(missed)} |")
    lines += ["", *(f"* below its bar: {text}" for text in below)]
    for family in dict.fromkeys(r.family for r in results):
        rows = [r for r in results if r.family == family]
        lines += ["", f"## {family}", "", f"![roofline](roofline-{family}.png)", "", markdown_table(rows)]
        lines += [f"* {text}" for text in noisy(rows)]
    return "\n".join(lines)


def write(results: list[Result], device: str, folder: Path) -> Path:
    """The whole report: summary and tables as Markdown, a roofline picture per family, and the JSON."""
    from benchmarks.plot import roofline

    save(results, device, folder / "results.json")
    for family in dict.fromkeys(r.family for r in results):
        rows = [r for r in results if r.family == family]
        roofline(rows, device, folder, f"roofline-{family}.png")
    page = folder / "report.md"
    page.write_text(markdown_summary(results, machine(device)))
    return page
