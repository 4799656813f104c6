"""The code of docs/decode.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "decode.md"


def test_the_pages_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    drafter = blocks[1].split("class ")[1].split("\n\n\n")[0]
    assert len(drafter.splitlines()) <= 20
