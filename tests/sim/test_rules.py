"""What the simulator lets pass, what it finds, and how it is steered."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.sim.planted import make_case
from tests.sim.planted import run as run_planted
from tests.sim.simulator import library_folder, load, runtime

COUNT = 2048

# None: the kernel keeps the rules.
EXPECTED = {
    "order": None,
    "store_beyond_buffer": "global memory out of bounds: write of 4 bytes, byte 8192 of a buffer of 8192",
    "load_beyond_buffer": "global memory out of bounds: read of 4 bytes, byte 8192 of a buffer of 8192",
    "null_pointer": "(global memory out of bounds|null pointer followed)",
    "store_beyond_dynamic_shared": "shared memory out of bounds: write of 4 bytes, byte 16384 of the dynamic",
    "store_between_statics": "shared memory out of bounds: write of 4 bytes, byte 128 of shared `first`",
    "neighbours_in_a_word": None,
    "same_byte": "race in shared memory: write of 1 byte",
    "every_thread_reads_all": None,
    "write_after_others_read": "race in shared memory: write .* after the read by",
    "global_write_write": "race in global memory: write .* after the write by thread",
    "global_between_blocks": "race in global memory: .* block",
    "global_in_place": None,
    "global_ordered_by_barrier": None,
    "atomic_and_plain": "race in global memory",
    "shared_histogram": None,
    "misaligned_atomic": "misaligned: atomic on 4 bytes",
    "misaligned_copy": "misaligned: the source of a cp.async of 16 bytes",
    "vector_in_static_shared": "misaligned: an access that needs 16-byte alignment, at byte .* of shared `values`",
    "other_threads_local": "local memory of another thread: read of 4 bytes",
    "ldmatrix_of_unwritten": "uninitialised shared memory: read of 16 bytes",
    "warp_exchange": None,
    "shuffle_is_no_barrier": "race in shared memory: read",
    "halves_sync_apart": None,
    "halves_sync_too_little": "race in shared memory: read",
    "branches_with_own_masks": None,
    "masks_disagree": "divergence: is in __shfl_xor_sync with mask",
    "operations_disagree": "divergence: is in __a(ny|ll)_sync .* wait for it in __a(ny|ll)_sync",
    "not_in_own_mask": "__any_sync with mask 0x7fffffff, which lacks the calling lane 31",
    "shuffle_from_outside_mask": r"shuffle from an absent lane: reads lane \d+, which takes no part",
    "odd_width": "shuffle width 12 is no power of two",
    "syncwarp_after_exit": None,
    "mma_after_exit": "mma.m16n8k16.bf16 with mask 0xffffffff names lane 31, which has exited",
    "mma_of_a_part_warp": "names lane 24, which the block does not have",
    "barrier_after_exit": None,
    "barriers_differ": "divergence: is in a __syncthreads while other threads of the block wait in that of line",
    "waits_for_ever": "deadlock: waits for ever in a named barrier",
    "one_barrier_too_few": "race in shared memory: write .* after the read by",
    "named_barrier_handover": None,
    "named_barrier_of_others": "(race in shared memory|uninitialised shared memory): read",
    "last_block_all_fence": None,
    "last_block_one_fences": None,
    "last_block_without_fence": "race in global memory: read .* after the write by block",
    "last_block_fence_too_late": "race in global memory: read .* after the write by block",
    "last_block_fence_too_early": "race in global memory: read .* after the write by block",
    "flag": None,
    "polls_for_ever": "deadlock: threads poll and nothing else happens",
    "overlap_waits": None,
    "overlap_touches_too_early": "overlap: read of 4 bytes, .*, before grid_dependency_wait",
    "overlap_ends_without_wait": "overlap: ends without grid_dependency_wait",
    "stack_overflow": "fault: the thread's stack overflowed",
    "throws": "exception in the kernel: thrown in a kernel",
    "traps": "__trap",
    "divides_by_zero": "integer division by zero",
    "shifts_too_far": "shift out of range: by 32",
}


def run(name: str) -> tuple[str, torch.Tensor]:
    data, counter = torch.zeros(2 * COUNT, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rule = load("tranche_rules_sim").tranche_rule
    arguments = (name.encode(), *(np.ctypeslib.as_ctypes(t.numpy()) for t in (data, counter)))
    with runtime().buffers(data[:COUNT], counter):
        assert rule(*arguments)
    return runtime().report(), data


def test_every_rule_has_its_test() -> None:
    names = load("tranche_rules_sim").tranche_rule_names
    names.restype = ctypes.c_char_p
    assert names().decode().split() == list(EXPECTED)


@pytest.mark.parametrize("name", list(EXPECTED))
@pytest.mark.parametrize("seed", range(4))
def test_rule(name: str, seed: int) -> None:
    runtime().set_seed(seed)
    report, data = run(name)
    if EXPECTED[name] is None:
        assert report == ""
    else:
        assert re.search(EXPECTED[name], report), report
    # Whatever a kernel tried, nothing was written outside the registered half.
    assert (data[COUNT:] == 0).all()


def test_findings_name_the_line() -> None:
    report, _ = run("store_beyond_buffer")
    assert re.search(r"block \(0,0,0\) thread \(31,0,0\) at csrc/sim/rules.cu:\d+: global memory", report)


def test_order_depends_on_the_seed_and_on_nothing_else() -> None:
    def order(seed: int) -> list[int]:
        runtime().set_seed(seed)
        report, data = run("order")
        assert report == ""
        return data[:256].tolist()

    orders = [order(seed) for seed in range(20)]
    assert all(sorted(o) == list(range(256)) for o in orders)
    assert len({tuple(o) for o in orders}) == 20
    assert [order(seed) for seed in range(20)] == orders


def test_launches_after_one_seed_differ() -> None:
    runtime().set_seed(3)
    assert run("order")[1].tolist() != run("order")[1].tolist()


def test_seed_from_the_environment() -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.sim import test_rules\n"
        "print(test_rules.run('order')[1][:256].tolist())"
    )

    def order(seed: str) -> str:
        environment = dict(os.environ, TRANCHE_SIM_SEED=seed, TRANCHE_SIM_LIBRARIES=str(library_folder()))
        command = [sys.executable, "-c", script, str(Path(__file__).parents[2])]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    runtime().set_seed(11)
    assert order("11").strip() == str(run("order")[1][:256].tolist())
    assert order("12").strip() != order("11").strip()


def test_ucontext_does_the_same() -> None:
    case = make_case()
    runtime().set_seed(5)
    with runtime().ucontext() as in_force:
        assert in_force
        outcome = run_planted("none", case)
        order = run("order")[1].tolist()
        assert "race in shared memory" in run("same_byte")[0]
    assert outcome.report == ""
    assert outcome.is_right(case)
    runtime().set_seed(5)
    run_planted("none", case)
    assert run("order")[1].tolist() == order


def test_unchecked_memory() -> None:
    """Without checks races go unseen, but lanes still have to meet."""
    with runtime().unchecked():
        before = runtime().counters().checked_accesses
        assert run("same_byte")[0] == ""
        assert run("masks_disagree")[0] != ""
        case = make_case()
        assert run_planted("none", case).is_right(case)
        assert runtime().counters().checked_accesses == before
    assert run("same_byte")[0] != ""


def test_counters() -> None:
    before = runtime().counters()
    run_planted("none", make_case(rows=16, pages=4, splits=1))
    after = runtime().counters()
    assert after.launches - before.launches == 1
    assert after.blocks - before.blocks == 1
    assert after.mma - before.mma == 4 * 2 * 4  # pages, halves of 16 columns, warps
    assert after.checked_accesses > before.checked_accesses


def test_threads_launch_at_once() -> None:
    """Launches from several host threads queue; each thread has its own buffers and its own report."""
    failures: list[str] = []

    def work(bug: str, expected: str) -> None:
        case = make_case()
        for _ in range(10):
            outcome = run_planted(bug, case)
            if (expected in outcome.report) != bool(expected) and outcome.report != expected:
                failures.append(outcome.report)

    jobs = [
        ("none", ""),
        ("barrier_removed", "race in shared memory"),
        ("none", ""),
        ("page_overrun", "out of bounds"),
    ]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
