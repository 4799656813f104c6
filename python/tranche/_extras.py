"""Packages that only a part of this one needs; the extras of pyproject.toml bring them too."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator

# by the name that one imports: what to call it, and what to ask pip for
_PACKAGES = {
    "transformers": ("transformers 5 or newer", "'transformers>=5'"),
    "sklearn": ("scikit-learn", "scikit-learn"),
    "scipy": ("scipy", "scipy"),
    "matplotlib": ("matplotlib", "matplotlib"),
    "onnx": ("onnx", "onnx"),
    "onnxscript": ("onnxscript", "onnxscript"),
}


class MissingExtra(ImportError):
    """A package is not installed, or is too old; the message says which, who needs it, and what to run."""


def require(by: str, *packages: str) -> None:
    """Say what is missing before work begins that would need it in the end.

    Args:
        by: who needs it, as the message calls it.
        packages: the names that are imported.

    Raises:
        MissingExtra: one of them is not there. While `python -m` looks for the module `by`, SystemExit with the same
            sentence: nobody could catch it there.
    """
    for package in packages:
        state = _state(package)
        if state:
            name, requirement = _PACKAGES[package]
            message = f"{by} needs {name}, {state}. Run pip install {requirement}."
            if sys.argv[:1] == ["-m"] and by in sys.orig_argv:
                raise SystemExit(message)
            raise MissingExtra(message, name=package)


@contextlib.contextmanager
def needed(by: str, *packages: str) -> Iterator[None]:
    """Import inside this context what `by` needs; otherwise as `require`."""
    require(by, *packages)
    yield


def _state(package: str) -> str:
    """What is wrong with a package; empty if nothing is."""
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is there, and lacks something itself
            raise
        return "which is not installed"
    version = getattr(module, "__version__", "")
    is_old = package == "transformers" and version.split(".")[0] in ("1", "2", "3", "4")
    return f"and {version} is installed" if is_old else ""
