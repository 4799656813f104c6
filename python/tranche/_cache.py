"""Where demonstrations keep what they trained."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def folder(given: Path | str | None) -> Path:
    """The one that was given, or `$XDG_CACHE_HOME/tranche`, or `~/.cache/tranche`."""
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tranche")


@contextlib.contextmanager
def filled(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` when it is whole.

    An interrupted run, or another one at work, leaves no half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix="partial-"))
    try:
        yield partial
        if not path.exists():
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
