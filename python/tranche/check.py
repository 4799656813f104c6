"""Whether this install works, and if not, what would mend it: `python -m tranche --check`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tranche import _library


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A remedy is given exactly when it is not as it should be."""

    what: str
    seen: str
    remedy: str | None = None


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a device of that compute capability.

    Args:
        architectures: as CMake names them, "80 90a-real": machine code and PTX, or with -real machine code alone.
        capability: major and minor.
    """
    device = 10 * capability[0] + capability[1]
    for name in architectures.split():
        match = re.fullmatch(r"(\d+)([af]?)(-real)?", name)
        if match is None:
            continue
        built, specific, real = int(match[1]), bool(match[2]), bool(match[3])
        if built == device:
            return True
        # machine code serves later minors of its major, PTX everything later; an "a" only what it was built for
        if not specific and built < device and (not real or built // 10 == capability[0]):
            return True
    return False


def _built_architectures() -> str | None:
    """Those of the CUDA kernels; None when the build cannot be asked."""
    try:
        host = importlib.import_module("tranche._host")
    except ImportError:
        return None
    return host.build_info()["cuda"].partition("architectures ")[2]


def _host() -> Iterator[Finding]:
    if _built_architectures() is None:
        yield Finding("build information", "tranche._host is of another Python; the ops do not need it")


def _cuda() -> Iterator[Finding]:
    if torch.version.cuda is None:
        yield Finding("CUDA", "torch is a CPU-only build; CPU kernels are used")
        return
    if not _library.HAS_CUDA:
        yield Finding(
            "CUDA",
            "torch knows CUDA, but this install has no CUDA kernels",
            "Put nvcc on PATH or set CUDA_HOME, then reinstall with TRANCHE_CUDA=1 pip install .",
        )
        return
    if not torch.cuda.is_available():
        yield Finding("CUDA", "kernels are there; no GPU is")
        return
    architectures = _built_architectures()
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        seen = f"{torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}"
        remedy = None
        if capability < (8, 0):
            seen += "; kernels need sm_80 or later"
            remedy = "Keep tensors on the CPU, or use an Ampere or later GPU."
        elif architectures is not None and not runs_on(architectures, capability):
            seen += f"; kernels were built for {architectures}"
            remedy = f'Reinstall with TORCH_CUDA_ARCH_LIST="{capability[0]}.{capability[1]}" pip install .'
        yield Finding(f"cuda:{index}", seen, remedy)


def _op(device: str) -> Finding:
    """One op, run, and its answer checked."""
    try:
        parent = torch.tensor([[-1, 0, 1]], dtype=torch.int32, device=device)
        n_nodes = torch.tensor([3], dtype=torch.int32, device=device)
        ancestors, _ = torch.ops.tranche.tree_ancestors(parent, n_nodes)
        answer = ancestors.flatten().tolist()
    except (RuntimeError, NotImplementedError) as error:
        return Finding(
            f"an op on {device}", str(error).splitlines()[0], "Reinstall with pip install --force-reinstall ."
        )
    if answer != [1, 3, 7]:
        return Finding(
            f"an op on {device}", f"gave {answer}, not [1, 3, 7]", "Report this as a bug, with this table."
        )
    return Finding(f"an op on {device}", "right")


def _ops() -> Iterator[Finding]:
    yield _op("cpu")
    if _library.HAS_CUDA and torch.cuda.is_available():
        yield _op("cuda")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_host, _cuda, _ops)


def findings() -> list[Finding]:
    """What was looked at, in order. That the package could be imported at all has shown its torch and its library."""
    first = Finding("library", f"tranche {_library.VERSION}, torch {torch.__version__}")
    return [first, *(finding for check in CHECKS for finding in check())]
