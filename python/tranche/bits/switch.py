"""What has a precision: modules whose bits are chosen per module (`set_bits`) or within a context (`at_bits`)."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from tranche.bits.packed import BITS, STORED_BITS

# What at_bits() put in force, bits by module: in this thread or task, and, for compiled code, in this thread.
# torch.compile can guard on what a thread-local object holds, not on a context variable.
_in_force: contextvars.ContextVar[Mapping[int, int] | None] = contextvars.ContextVar("bits", default=None)


class _OfThread(threading.local):
    bits: Mapping[int, int] | None = None


_of_thread = _OfThread()


def check_bits(bits: int) -> int:
    """A number of bits, or a ValueError."""
    if isinstance(bits, float) or bits not in BITS:  # 4.0 is in the range, too
        raise ValueError(
            f"tranche.bits.set_bits: expected bits in {list(BITS)}, got {bits!r}. Choose one of these."
        )
    return bits


class Switchable(nn.Module):
    """A module with a precision.

    Attributes:
        bits: the precision, unless `at_bits` says otherwise.
    """

    _bits: int = STORED_BITS
    _stay_float32: tuple[str, ...] = ()  # buffers, whatever .half() and .to(bfloat16) say of activations

    @property
    def bits(self) -> int:
        """The precision, 2 to 8."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        self._bits = check_bits(bits)

    def bits_in_force(self) -> int:
        """The precision to compute at now."""
        compiling = torch.compiler.is_compiling()
        override = _of_thread.bits if compiling else _in_force.get()
        return self._bits if override is None else override.get(id(self), self._bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Switchable:
        kept = {name: self._buffers[name] for name in self._stay_float32}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)
        return self


def _assignment(model: nn.Module, bits: int | Mapping[str, int]) -> dict[Switchable, int]:
    """Bits by module: one number for all, or the longest matching prefix of its name."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Switchable)}
    if not modules:
        raise ValueError(
            f"tranche.bits.set_bits: expected a model with bit-switching layers, got {type(model).__name__} without. "
            "Convert it with tranche.bits.convert(model)."
        )
    if not isinstance(bits, Mapping):
        return dict.fromkeys(modules.values(), check_bits(bits))
    chosen = {}
    used = set()
    for name, module in modules.items():
        prefixes = [p for p in bits if p == "" or name == p or name.startswith(p + ".")]
        if prefixes:
            longest = max(prefixes, key=len)
            used |= set(prefixes)
            chosen[module] = check_bits(bits[longest])
    unknown = set(bits) - used
    if unknown:
        raise ValueError(
            f"tranche.bits.set_bits: expected prefixes of bit-switching modules, got {sorted(unknown)}. "
            "See model.named_modules()."
        )
    return chosen


def set_bits(model: nn.Module, bits: int | Mapping[str, int]) -> None:
    """Choose the precision of a model's bit-switching modules.

    Args:
        model: the model.
        bits: one number for all of them, or numbers by name, of which the longest matching prefix wins; modules
            that none matches keep theirs.

    Raises:
        ValueError: a number that is not 2 to 8, a name that matches no such module, or a model without any.
    """
    for module, number in _assignment(model, bits).items():
        module.bits = number


@contextlib.contextmanager
def at_bits(model: nn.Module, bits: int | Mapping[str, int]) -> Iterator[None]:
    """Within this context, in this thread or task only, the model computes at these bits (as `set_bits` reads them).

    A compiled model compiles once for each value, and goes by the contexts of its thread: tasks of one event loop that
    switch inside the context should call the model itself.
    """
    override = {id(module): number for module, number in _assignment(model, bits).items()}
    outer = _of_thread.bits
    token = _in_force.set({**(_in_force.get() or {}), **override})
    _of_thread.bits = {**(outer or {}), **override}
    try:
        yield
    finally:
        _of_thread.bits = outer
        _in_force.reset(token)


__all__ = ["Switchable", "at_bits", "set_bits"]
