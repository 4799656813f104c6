"""Weights put into the kernel's order once, and kept beside a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tranche import _library


class KeepsPacked(nn.Module):
    """A module that keeps its weights in the order of the CPU's kernels, from the first call that wants them so.

    What is kept belongs to this process and processor. It is no part of the module's state: copies, pickles, moves and
    `load_state_dict` leave it behind, and it is made anew when a weight is another tensor or was written to. A graph
    that is traced (compiled, exported) takes the weights as they are.
    """

    _kept: tuple[list[tuple[int, int]], Tensor] | None = None

    def packed(self, pack: Callable[..., Tensor], *weights: Tensor | None, **options: Any) -> Tensor | None:
        """pack(*weights, **options), kept; none where kernels take weights as they lie."""
        if torch.compiler.is_compiling() or _library.active() != _library.NAMESPACES[0]:
            return None
        given = [w for w in weights if w is not None]
        if not given[0].is_cpu:
            return None
        # tensors of inference mode have no version: writing to them goes unseen
        now = [(id(w), 0 if w.is_inference() else w._version) for w in given]
        if self._kept is None or self._kept[0] != now:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = now, pack(*weights, **options)
        return self._kept[1]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}
