"""Runs csrc/sim/planted.cu, with a bug or without."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass

import torch

from tests.sim.simulator import load, runtime

# In the order of the kernel's enum.
BUGS = [
    "none",
    "barrier_removed",
    "wait_removed",
    "wait_too_weak",
    "wait_after_barrier",
    "tail_shared_off_by_one",
    "tail_global_off_by_one",
    "swapped_fragments",
    "syncwarp_removed",
    "reduction_race",
    "page_overrun",
    "wrong_shuffle_lane",
    "collective_after_exit",
    "partial_mask",
    "uninitialised_shared",
    "misaligned_vector",
    "fence_removed",
    "counter_not_atomic",
    "divergent_barrier",
    "ring_slot_reused",
]


class Params(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("a", "w", "table", "partial", "counter", "out", "row_max")],
        ("M", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("splits", ctypes.c_int32),
    ]


@dataclass
class Case:
    """Integer-valued inputs: the right result is exact, whatever the order of summation."""

    a: torch.Tensor
    w: torch.Tensor
    table: torch.Tensor
    splits: int

    @property
    def product(self) -> torch.Tensor:
        pages = self.w[self.table.long()]
        return self.a.float() @ pages.flatten(0, 1).float()

    @property
    def row_max(self) -> torch.Tensor:
        pages = self.a.float().unflatten(1, (-1, 16))
        bounds = [len(self.table) * s // self.splits for s in range(self.splits + 1)]
        return torch.stack([pages[:, i:j].amax((1, 2)) for i, j in itertools.pairwise(bounds)])


def make_case(rows: int = 37, pages: int = 8, splits: int = 2, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-9, 10, (rows, pages * 16), generator=generator).bfloat16()
    w = torch.randint(-9, 10, (pages, 16, 64), generator=generator).bfloat16()
    return Case(a, w, torch.randperm(pages, generator=generator).int(), splits)


@dataclass
class Outcome:
    report: str
    out: torch.Tensor
    row_max: torch.Tensor

    def is_right(self, case: Case) -> bool:
        return torch.equal(self.out, case.product) and torch.equal(self.row_max, case.row_max)


def run(bug: str, case: Case, *, register: bool = True) -> Outcome:
    rows, depth = case.a.shape
    partial = torch.full((case.splits, rows, 64), torch.nan)
    counter = torch.zeros((rows + 15) // 16, dtype=torch.int32)
    out, row_max = torch.full((rows, 64), torch.nan), torch.full((case.splits, rows), torch.nan)
    tensors = (case.a, case.w, case.table, partial, counter, out, row_max)
    params = Params(*[t.data_ptr() for t in tensors], rows, depth, case.splits)
    library = load("tranche_planted_sim")
    with runtime().buffers(*(tensors if register else ())):
        failed = library.tranche_planted(BUGS.index(bug), ctypes.byref(params))
    report = runtime().report()
    assert bool(failed) == bool(report)
    return Outcome(report, out, row_max)
