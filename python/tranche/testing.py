"""For tests of kernels: run the simulated CUDA kernels where the package would call the real ones."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from tranche import _library


def simulator_available() -> bool:
    """Whether this install has the simulator (`make install` builds it; users' installs leave it out)."""
    return _library.HAS_SIMULATOR


@contextlib.contextmanager
def use_simulator(seed: int | None = None) -> Iterator[None]:
    """Within this context every function of the package runs the simulated CUDA kernels, on CPU tensors.

    Args:
        seed: the order in which the simulator resumes threads, warps and blocks; None keeps the present one.

    Raises:
        RuntimeError: the simulator is not built.
    """
    previous = _library.activate("tranche_sim")
    try:
        if seed is not None:
            simulator_seed(seed)
        yield
    finally:
        _library.activate(previous)


def simulator_seed(seed: int) -> None:
    """Set the seed of the simulator's scheduling order."""
    runtime = ctypes.CDLL(str(_library.PACKAGE / "libtranche_simrt.so"))
    runtime.tranche_sim_set_seed(ctypes.c_uint64(seed))
