"""The example drafter of docs/decode.md stays an example. That it runs, tests/core/test_pages.py sees to."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "decode.md"


def test_the_example_drafter_is_short():
    drafter = re.search(r"^class .*?(?=\n\n\n)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert drafter is not None and "propose" in drafter[0]
    assert len(drafter[0].splitlines()) <= 20
