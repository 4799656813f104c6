"""Real text without downloads: the source files of Python's standard library, as bytes.

Every machine that runs Python has them. A file belongs to the training text or to the held-out text as a hash of its
name says, so that both are the same on every run, and no held-out file was trained on.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

HELD_OUT_SHARE = 16  # one file in sixteen is held out
END_OF_FILE = 0  # the byte between files, and the end of a sequence; no source file has it
_LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}


def standard_library(split: Literal["train", "held_out"] = "train") -> Tensor:
    """The sources of the standard library, without its tests, as one text.

    Args:
        split: the files to train on, or those to measure on.

    Returns:
        uint8 [bytes], files in order of their names, each ended by a zero byte.

    Raises:
        ValueError: another split.
        FileNotFoundError: this Python has no sources of its standard library.
    """
    if split not in ("train", "held_out"):
        raise ValueError(
            f"tranche.standard_library: expected split 'train' or 'held_out', got {split!r}. Name one of these."
        )
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    text = bytearray()
    for name in names:
        held_out = zlib.crc32(name.as_posix().encode()) % HELD_OUT_SHARE == 0
        if _LEFT_OUT.isdisjoint(name.parts) and held_out == (split == "held_out"):
            text += (root / name).read_bytes().replace(b"\0", b"") + bytes([END_OF_FILE])
    if not text:
        raise FileNotFoundError(
            f"tranche.standard_library: expected Python sources under {root}, got none. "
            "Use a Python that was installed with its standard library's sources."
        )
    return torch.frombuffer(text, dtype=torch.uint8)
