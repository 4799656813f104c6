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


# Python kernels live as long as the library object that registered them.
_python_kernels: list[torch.library.Library] = []


def register_in_place(op: str, mutated: tuple[str, ...]) -> None:
    """Make `op`, which writes to its arguments named in `mutated`, sound under autograd, in every namespace.

    Libraries of the stable ABI register kernels and nothing else: without this, no version would be bumped, and
    backward through such an op would be silently wrong. Versions of the mutated tensors (or of each in a list) go up
    by one; a call with grad enabled in which any tensor requires a gradient raises RuntimeError.
    """
    for namespace in NAMESPACES:
        _register_in_place(namespace, op, mutated)


def _register_in_place(namespace: str, op: str, mutated: tuple[str, ...]) -> None:
    overload = getattr(getattr(torch.ops, namespace), op).default
    names = [argument.name for argument in overload._schema.arguments]

    def tensors(value: Any) -> list[torch.Tensor]:
        values = value if isinstance(value, (list, tuple)) else (value,)
        return [tensor for tensor in values if isinstance(tensor, torch.Tensor)]

    def bump_versions(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        result = overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in mutated:
            for tensor in tensors(given.get(name)):
                torch.autograd.graph.increment_version(tensor)
        return result

    def refuse_gradients(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for name, value in (dict(zip(names, args, strict=False)) | kwargs).items():
                if any(tensor.requires_grad for tensor in tensors(value)):
                    raise RuntimeError(
                        f"tranche.{op}: expected no argument that requires a gradient, got {name}. This op writes to "
                        f"{', '.join(mutated)} and has no derivative: call it under torch.no_grad(), or detach {name}."
                    )
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    library = torch.library.Library(namespace, "IMPL")
    library.impl(op, bump_versions, "ADInplaceOrView", with_keyset=True)
    library.impl(op, refuse_gradients, "Autograd", with_keyset=True)
    _python_kernels.append(library)
