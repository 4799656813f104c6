"""The simulator's libraries through ctypes, for the tests of the simulator itself."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch


@functools.cache
def library_folder() -> Path:
    """Where the libraries are: TRANCHE_SIM_LIBRARIES, or beside the installed package, or a build in the tree."""
    named = os.environ.get("TRANCHE_SIM_LIBRARIES")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("tranche")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "libtranche_simrt.so").exists():
            return Path(folder)
    return Path(__file__).resolve().parents[2] / "build" / "sim"


@functools.cache
def load(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(library_folder() / f"lib{name}.so"))


class Counters(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("launches", "blocks", "switches", "collectives", "mma", "barriers", "checked_accesses")
    ]


class Runtime:
    """The controls of libtranche_simrt."""

    def __init__(self) -> None:
        self._library = load("tranche_simrt")
        self._library.tranche_sim_last_report.restype = ctypes.c_char_p
        self._library.tranche_sim_set_seed.argtypes = [ctypes.c_uint64]
        for name in ("register", "unregister"):
            function = getattr(self._library, f"tranche_sim_{name}_buffer")
            function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def set_seed(self, seed: int) -> None:
        self._library.tranche_sim_set_seed(seed)

    def report(self) -> str:
        return self._library.tranche_sim_last_report().decode()

    def counters(self) -> Counters:
        counters = Counters()
        self._library.tranche_sim_read_counters(ctypes.byref(counters))
        return counters

    @contextlib.contextmanager
    def buffers(self, *tensors: torch.Tensor) -> Iterator[None]:
        """Kernels may touch these tensors and nothing else."""
        ranges = [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
        for address, size in ranges:
            self._library.tranche_sim_register_buffer(address, size)
        try:
            yield
        finally:
            for address, size in ranges:
                self._library.tranche_sim_unregister_buffer(address, size)

    @contextlib.contextmanager
    def ucontext(self) -> Iterator[bool]:
        """Fibers are switched by ucontext, as they are where there is no assembly for the processor."""
        before = self._library.tranche_sim_use_ucontext(1)
        try:
            yield bool(before)
        finally:
            self._library.tranche_sim_use_ucontext(0)

    @contextlib.contextmanager
    def unchecked(self) -> Iterator[None]:
        """Memory accesses are not checked."""
        self._library.tranche_sim_set_checks(0)
        try:
            yield
        finally:
            self._library.tranche_sim_set_checks(1)


@functools.cache
def runtime() -> Runtime:
    return Runtime()
