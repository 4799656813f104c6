"""Tests must not depend on how busy the machine is: a step costs what its size says, and nothing is known before."""

from __future__ import annotations

import pytest

from tranche.decode import generation
from tranche.decode.pace import Pace


@pytest.fixture(autouse=True)
def steady_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    generation._paces.clear()
    timed = Pace.timed
    monkeypatch.setattr(Pace, "timed", lambda self, size, seconds: timed(self, size, 1 + 0.02 * size))
