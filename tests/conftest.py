"""The `backend` fixture: every kernel test runs on the CPU kernel, the simulated CUDA kernel, and a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings

from tranche import testing

# Examples are drawn the same way on every run; a kernel's first call may be slow.
settings.register_profile(
    "tranche",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tranche")


@dataclass(frozen=True)
class Backend:
    """Where a test's kernels run. `namespace` is that of its raw ops, `device` that of its tensors."""

    name: str
    namespace: str
    device: str

    def ops(self):
        return getattr(torch.ops, self.namespace)

    def pick(self, cpu, sim):
        """A size: the simulator, thousands of times slower, takes the second."""
        return sim if self.name == "sim" else cpu


BACKENDS = {
    "cpu": Backend("cpu", "tranche", "cpu"),
    "sim": Backend("sim", "tranche_sim", "cpu"),
    "cuda": Backend("cuda", "tranche", "cuda"),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    with testing.use_simulator(seed=0) if request.param == "sim" else contextlib.nullcontext():
        yield BACKENDS[request.param]


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
