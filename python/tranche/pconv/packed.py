"""Weights put into the kernel's order once, and kept beside a module."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tranche import _library

_Packed = TypeVar("_Packed")


class _Kept(NamedTuple):
    weights: list[tuple[weakref.ref[Tensor], int, int | None]]
    packed: Any

    def is_of(self, weights: list[Tensor]) -> bool:
        """Whether these are the weights, with the memory and the version they had."""
        if len(weights) != len(self.weights):
            return False
        for weight, (kept, memory, version) in zip(weights, self.weights, strict=True):
            if kept() is not weight or weight.data_ptr() != memory:
                return False
            if version is not None and weight._version != version:
                return False
        return True


def _state(weight: Tensor) -> tuple[weakref.ref[Tensor], int, int | None]:
    """The tensor (by no id, which may be another's once it is gone), its memory, and how often it was written to."""
    return weakref.ref(weight), weight.data_ptr(), None if weight.is_inference() else weight._version


def _is_watched() -> bool:
    """Whether someone records or replaces the ops that are called."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


class KeepsPacked(nn.Module):
    """A module that keeps its weights in the order of the CPU's kernels, from the first call that wants them so.

    What is kept belongs to this process and processor. It is no part of the module's state: copies, pickles, moves and
    `load_state_dict` leave it behind, and it is made anew when a weight is another tensor, has other memory or was
    written to. Writing past torch's versions goes unseen: through `.data` or NumPy, or to tensors of inference mode.
    Whoever traces (compiles, exports), dispatch modes and the transforms of torch.func get the weights as they are.
    """

    _kept: _Kept | None = None

    def packed(self, pack: Callable[..., _Packed], *weights: Tensor | None, **options: Any) -> _Packed | None:
        """pack(*weights, **options), kept; none where kernels take weights as they lie."""
        if _is_watched() or _library.active() != _library.NAMESPACES[0]:
            return None
        given = [w for w in weights if w is not None]
        kept = self._kept  # read once: another thread may be here too
        if kept is not None and kept.is_of(given):
            return kept.packed
        if not given[0].is_cpu:
            return None
        try:
            states = [_state(w) for w in given]
        except RuntimeError:  # what a transform wraps has no memory of its own
            return None
        with torch.inference_mode(False), torch.no_grad():
            made = pack(*weights, **options)
        self._kept = _Kept(states, made)
        return made

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}
