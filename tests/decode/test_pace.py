"""The tree's size follows what passes cost and what nodes earn."""

from __future__ import annotations

import pytest

from tranche.decode.pace import Pace

SETTLED = 40


def sizes(cost, accepted, steps: int = 120, largest: int = 60) -> list[int]:
    """Sizes chosen when a step of n nodes costs cost(n) and node i is accepted at the rate accepted(i)."""
    pace = Pace(largest)
    chosen = []
    for _ in range(steps):
        size = pace.size()
        chosen.append(size)
        pace.timed(size, cost(size))
        rates = [accepted(i) if i < size else 0.0 for i in range(largest)]
        pace.earned(rates, [1.0 if i < size else 0.0 for i in range(largest)])
    return chosen


@pytest.fixture(autouse=True)
def real_costs(steady_pace, monkeypatch):
    monkeypatch.undo()


def test_free_nodes_make_large_trees():
    chosen = sizes(lambda n: 1.0, lambda i: 0.05)
    assert set(chosen[SETTLED:]) == {60}


def test_useless_nodes_make_plain_decoding():
    chosen = sizes(lambda n: 1 + 0.02 * n, lambda i: 0.0)
    assert (
        set(chosen[SETTLED:]) <= {1, 60} and chosen[SETTLED:].count(60) <= 2
    )  # 60: looks again now and then


def test_costs_that_rise_from_some_size_on():
    chosen = sizes(lambda n: 1.0 if n <= 8 else 1.0 + 0.05 * (n - 8), lambda i: 0.5 if i < 8 else 0.01)
    assert max(set(chosen[SETTLED:]), key=chosen[SETTLED:].count) == 8


def test_it_notices_a_change():
    pace = Pace(60)
    for step in range(300):
        size = pace.size()
        pace.timed(size, 1.0 if step < 100 else 1 + size)
        pace.earned([0.1] * size, [1.0] * size)
        if step == 99:
            assert size == 60
    assert size <= 2


def test_every_size_from_one_works():
    for largest in (1, 2, 7, 8, 9, 60, 1024):
        chosen = sizes(lambda n: 1.0, lambda i: 0.1, steps=60, largest=largest)
        assert min(chosen) >= 1 and max(chosen) == largest
