"""The simulator catches what it says it catches: each planted bug, and nothing in the kernel as it should be."""

from __future__ import annotations

import re

import pytest

from tests.sim.planted import BUGS, make_case, run
from tests.sim.simulator import runtime

SEEDS = 50

# Each bug with what must be found, and in a line of what source; None where the kernel keeps every rule and only
# computes the wrong thing, which the comparison with the right result must show.
EXPECTED = {
    "barrier_removed": r"race in shared memory",
    "wait_removed": r"cp.async data in flight: read",
    "wait_too_weak": r"cp.async data in flight: read",
    "wait_after_barrier": r"(cp.async data in flight|race in shared memory): read",
    "tail_shared_off_by_one": r"(index out of bounds: 64|shared memory out of bounds)",
    "tail_global_off_by_one": r"global memory out of bounds: read of 16 bytes",
    "swapped_fragments": None,
    "syncwarp_removed": r"race in shared memory",
    "reduction_race": r"race in shared memory",
    "page_overrun": r"global memory out of bounds: read of 16 bytes",
    "wrong_shuffle_lane": None,
    "collective_after_exit": r"__shfl_xor_sync with mask 0xffffffff names lane \d+, which has exited",
    "partial_mask": r"divergence: .*__shfl_xor_sync with mask 0xffffffff",
    "uninitialised_shared": r"uninitialised shared memory: read",
    "misaligned_vector": r"misaligned: an access that needs 16-byte alignment",
    "fence_removed": r"race in global memory: read .* after the write by block",
    "counter_not_atomic": r"race in global memory: .* after the (write|read) by block",
    "divergent_barrier": r"(divergence|deadlock)",
    "ring_slot_reused": r"(race in shared memory: write|cp.async data in flight: read)",
}


def test_every_bug_has_its_test() -> None:
    assert ["none", *EXPECTED] == BUGS


def test_the_clean_kernel_is_clean() -> None:
    cases = [make_case(), make_case(rows=16, pages=1, splits=1), make_case(rows=33, pages=5, splits=3)]
    for seed in range(SEEDS):
        runtime().set_seed(seed)
        for case in cases:
            outcome = run("none", case)
            assert outcome.report == ""
            assert outcome.is_right(case)


@pytest.mark.parametrize("bug", list(EXPECTED))
@pytest.mark.parametrize("seed", range(5))
def test_bug_is_caught(bug: str, seed: int) -> None:
    runtime().set_seed(seed)
    case = make_case()
    outcome = run(bug, case)
    pattern = EXPECTED[bug]
    if pattern is None:
        assert outcome.report == ""
        assert not outcome.is_right(case)
        return
    found = [line for line in outcome.report.splitlines()[1:] if re.search(pattern, line)]
    assert found, outcome.report
    # Who, and where.
    assert re.search(r"block \(\d+,\d+,\d+\) thread \(\d+,\d+,\d+\) at csrc/sim/planted.cu:\d+: ", found[0])
    assert f"kernel paged_product: {len(outcome.report.splitlines()) - 1} finding" in outcome.report


def test_a_bad_store_is_stopped_before_it_lands() -> None:
    """Nothing outside the tensors changes: the page table names a page far outside."""
    case = make_case()
    case.table[3] = 10**6
    outcome = run("none", case)
    assert "global memory out of bounds" in outcome.report
    assert "stopped before the end" in outcome.report


def test_a_wild_pointer_is_a_finding_even_without_registration() -> None:
    case = make_case()
    case.table[3] = 2**30
    outcome = run("none", case, register=False)
    assert "fault: access to global memory" in outcome.report
    assert run("none", make_case()).report == ""
