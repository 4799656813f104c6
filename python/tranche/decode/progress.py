"""A progress bar over what a loop says of itself."""

from __future__ import annotations

from collections.abc import Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def shown(counts: Iterator[int], total: int) -> Iterator[int]:
    """Pass the counts of tokens on, beside a bar of `total`."""
    columns = (TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=total)
        for count in counts:
            bar.update(task, completed=count)
            yield count
