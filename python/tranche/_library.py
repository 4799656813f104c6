"""Loads the op libraries, once, and tells which of their two namespaces functions of the package call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError("tranche needs torch 2.10 or newer, found none. Run `pip install torch`.") from error

PACKAGE = Path(__file__).parent
try:
    VERSION = metadata.version("tranche")
except metadata.PackageNotFoundError as error:
    raise ImportError(
        f"tranche was imported from {PACKAGE}, which is not installed. Run `pip install .` in the repository."
    ) from error

_F = TypeVar("_F", bound=Callable[..., Any])


def _require_torch() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 10):
        raise ImportError(f"tranche needs torch 2.10 or newer, found {torch.__version__}. Upgrade torch.")


def _load(name: str) -> bool:
    path = PACKAGE / f"lib{name}.so"
    if path.exists():
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise ImportError(
                f"{path.name} does not load beside torch {torch.__version__}: {error}. It was built for another "
                "machine or another torch; run `pip install --force-reinstall .` in the repository."
            ) from error
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


def active() -> str:
    """The name of the namespace in force."""
    return _active


def activate(namespace: str) -> str:
    """Make `namespace` the one in force, and return the one that was."""
    global _active
    if namespace not in NAMESPACES:
        raise RuntimeError(f"{namespace} is not built; run `make install`, or build with TRANCHE_SIM=1.")
    previous, _active = _active, namespace
    return previous


def _needs_grad(args: Iterable[Any]) -> bool:
    if torch.is_grad_enabled():
        for value in args:  # no instance checks: for tensors they take half as long as a small op
            for item in value if type(value) is list else (value,):
                if getattr(item, "requires_grad", False):
                    return True
    return False


def call(op: str, *args: Any) -> Any:
    """The op in force, past the kernels of autograd where no gradient is wanted.

    What torch.library registers for autograd is Python, and takes longer than a small op.
    """
    function = getattr(ops(), op)
    if torch.compiler.is_compiling() or _needs_grad(args):
        return function(*args)
    with _BelowAutograd():
        return function(*args)


def call_inplace(op: str, *args: Any, **kwargs: Any) -> Any:
    """`call` for an op that `register_inplace` was told of; the tensors that it writes get their new version here."""
    function = getattr(ops(), op)
    if torch.compiler.is_compiling() or _needs_grad(args) or _needs_grad(kwargs.values()):
        return function(*args, **kwargs)
    with _BelowInplace():
        result = function(*args, **kwargs)
    _raise_versions(op, args, kwargs)
    return result


def register_fake(op: str) -> Callable[[_F], _F]:
    """Register the decorated function as the fake (shape-only) kernel of `op` in every namespace."""

    def register(function: _F) -> _F:
        for namespace in NAMESPACES:
            torch.library.register_fake(f"{namespace}::{op}", function)
        return function

    return register


_BelowAutograd: Any = torch._C._AutoDispatchBelowAutograd
_BelowInplace: Any = torch._C._AutoDispatchBelowADInplaceOrView
_autograd_kernels: list[torch.library.Library] = []
_written: dict[str, list[tuple[int, str]]] = {}  # which arguments an op in place writes, by place and name


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _raise_versions(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    values = (args[i] if i < len(args) else kwargs.get(name) for i, name in _written[op])
    # tensors of inference mode have no version to raise
    torch.autograd.graph.increment_version([t for t in _tensors(values) if not t.is_inference()])


def register_inplace(op: str) -> None:
    """Make the in-place `op` safe beside autograd, in every namespace.

    Ops registered through the stable ABI neither raise their outputs' version nor refuse autograd, so a backward pass
    through what they overwrote would be silently wrong. Below autograd the op now counts as an in-place change of the
    tensors that its schema marks as written; above it, a tensor that requires grad is refused.
    """
    for namespace in NAMESPACES:
        overload = getattr(getattr(torch.ops, namespace), op).default
        arguments = overload._schema.arguments
        _written[op] = [
            (i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        _register_inplace(namespace, op, overload, [argument.name for argument in arguments])


def _register_inplace(namespace: str, op: str, overload: Any, names: list[str]) -> None:
    def inplace(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        result = overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)
        _raise_versions(op, args, kwargs)
        return result

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for name, value in (*zip(names, args, strict=False), *kwargs.items()):
                if any(t.requires_grad for t in _tensors([value])):
                    raise RuntimeError(
                        f"tranche.{op}: expected tensors that do not require grad, got {name} that does. The op "
                        "writes in place and has no backward; call it under torch.no_grad(), or detach."
                    )
        return inplace(keyset, *args, **kwargs)

    library = torch.library.Library(namespace, "IMPL")
    library.impl(op, inplace, "ADInplaceOrView", with_keyset=True)
    library.impl(op, autograd, "Autograd", with_keyset=True)
    _autograd_kernels.append(library)  # a library that is collected takes its kernels with it
