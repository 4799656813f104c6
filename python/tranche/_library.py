"""Loads the op libraries, once, and tells which of their two namespaces functions of the package call."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

PACKAGE = Path(__file__).parent
VERSION = metadata.version("tranche")

_F = TypeVar("_F", bound=Callable[..., Any])


def _require_torch() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 10):
        raise ImportError(f"tranche needs torch 2.10 or newer, found {torch.__version__}. Upgrade torch.")


def _load(name: str) -> bool:
    path = PACKAGE / f"lib{name}.so"
    if path.exists():
        torch.ops.load_library(path)
    return path.exists()


_require_torch()
if not _load("tranche_cpu"):
    raise ImportError(
        f"tranche was imported from {PACKAGE}, where its libraries are not built. "
        "Run `pip install .` in the repository, or leave its folder."
    )
# The CUDA library's symbols are those of a CUDA build of torch; without one it stays on disk.
HAS_CUDA = torch.version.cuda is not None and _load("tranche_cuda")
HAS_SIMULATOR = _load("tranche_sim")

NAMESPACES = ("tranche", "tranche_sim") if HAS_SIMULATOR else ("tranche",)
_active = NAMESPACES[0]


def ops() -> Any:
    """The namespace of raw ops in force: `torch.ops.tranche`, or the simulated CUDA kernels."""
    return getattr(torch.ops, _active)


def activate(namespace: str) -> str:
    """Make `namespace` the one in force, and return the one that was."""
    global _active
    if namespace not in NAMESPACES:
        raise RuntimeError(f"{namespace} is not built; run `make install`, or build with TRANCHE_SIM=1.")
    previous, _active = _active, namespace
    return previous


def register_fake(op: str) -> Callable[[_F], _F]:
    """Register the decorated function as the fake (shape-only) kernel of `op` in every namespace."""

    def register(function: _F) -> _F:
        for namespace in NAMESPACES:
            torch.library.register_fake(f"{namespace}::{op}", function)
        return function

    return register
