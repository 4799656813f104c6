"""`python -m benchmarks [family ...]`: the microbenchmarks, each row with its baselines and its limit."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import harness, report

FAMILIES = ("tree", "moe", "bits", "pconv", "decode")


def percent(text: str) -> float:
    return float(text.removesuffix("%")) / 100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "families", nargs="*", metavar="family", help=f"which of {', '.join(FAMILIES)} (default: all)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--vs", help="baselines to compare with, separated by commas (default: all)")
    parser.add_argument("--only", help="a regular expression that names of rows must match")
    parser.add_argument("--quick", action="store_true", help="few rows, few repeats: about a minute")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--compare", type=Path, help="compare with results written earlier")
    parser.add_argument(
        "--fail-above", type=percent, default=0.05, help="with --compare: tolerated slowdown (5%%)"
    )
    parser.add_argument("--check", action="store_true", help="fail when a row misses its bar")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw a roofline picture there")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write a report there: Markdown, JSON, a roofline per family",
    )
    arguments = parser.parse_args()
    unknown = set(arguments.families) - set(FAMILIES)
    if unknown:
        parser.error(f"unknown family {', '.join(sorted(unknown))}; there is {', '.join(FAMILIES)}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    # a log has no edge to fit into
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = {
        family: importlib.import_module(f"benchmarks.{family}").rows(arguments.device)
        for family in arguments.families or FAMILIES
    }
    wanted = set(arguments.vs.split(",")) if arguments.vs else None
    with torch.inference_mode():
        results = harness.run(rows, arguments.device, wanted, arguments.quick, arguments.only)
    report.show(results, console)
    if not results:
        console.print("No row matches; leave out --only or --quick.")
        return 1
    if arguments.json:
        report.save(results, arguments.device, arguments.json)
    if arguments.report:
        console.print(f"Report: {report.write(results, arguments.device, arguments.report)}")
    if arguments.plot:
        from benchmarks.plot import roofline

        console.print(f"Roofline: {roofline(results, arguments.device, arguments.plot)}")
    complaints = [missed for r in results for missed in r.missed_bars()] if arguments.check else []
    if arguments.compare:
        complaints += report.slower_than(results, arguments.compare, arguments.fail_above)
    for complaint in complaints:
        console.print(f"[red]{complaint}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
