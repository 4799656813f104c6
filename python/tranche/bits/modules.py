"""Modules over one stored weight, whose precision is chosen per call, per module, or within a context."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tranche.bits.ops import linear, pack, quantize
from tranche.bits.packed import BITS, STORED_BITS, PackedWeight

# What at_bits() put in force in this thread or task: bits by module.
_in_force: contextvars.ContextVar[Mapping[int, int] | None] = contextvars.ContextVar("bits", default=None)


def _check_bits(bits: int) -> int:
    if bits not in BITS:
        raise ValueError(f"tranche.bits: expected bits in {list(BITS)}, got {bits!r}. Choose one of these.")
    return bits


class _BitSwitch(nn.Module):
    """What both modules share: packed data [O, I], scale, bias, and the precision.

    Attributes:
        bits: the precision, unless `at_bits` says otherwise.
        activation_bits: None, or 8 for integer activations.
    """

    data: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        bits: int = STORED_BITS,
        activation_bits: int | None = None,
    ):
        super().__init__()
        packed = pack(codes)
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self.layout = packed.layout
        self._bits = _check_bits(bits)
        self.activation_bits = activation_bits
        self.register_buffer("data", packed.data)
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    @property
    def bits(self) -> int:
        """The precision, 2 to 8."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        self._bits = _check_bits(bits)

    @property
    def packed(self) -> PackedWeight:
        """The weight as the functions of the family take it."""
        return PackedWeight(self.data, self.out_features, self.in_features, self.layout)

    def _bits_in_force(self) -> int:
        # Dynamo can neither trace a context variable nor guard on one: compiled code knows the attribute only.
        if torch.compiler.is_compiling():
            return self._bits
        override = _in_force.get()
        return self._bits if override is None else override.get(id(self), self._bits)

    def _linear(self, x: Tensor) -> Tensor:
        return linear(
            x, self.packed, self.scale, self._bits_in_force(), self.bias, activation_bits=self.activation_bits
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _BitSwitch:
        # .half() and .to(bfloat16) speak of activations: scales and bias stay float32.
        kept = {name: self._buffers[name] for name in ("scale", "bias")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if buffer is not None and self._buffers[name].dtype != torch.float32:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def get_extra_state(self) -> dict[str, int]:
        """Layout and shape go with the packed data."""
        return {"layout": self.layout, "out_features": self.out_features, "in_features": self.in_features}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Refuse data of a layout or shape that this module does not have."""
        own = self.get_extra_state()
        if state != own:
            raise ValueError(
                f"tranche.bits: expected packed data with {own}, got {state}. Unpack it with the version that packed "
                "it, and pack its codes with this one."
            )

    def extra_repr(self) -> str:
        """Shape and precision."""
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, activation_bits={self.activation_bits}, "
            f"bias={self.bias is not None}"
        )


class BitSwitchLinear(_BitSwitch):
    """`nn.Linear` over one stored weight: x [..., I] to [..., O] at `bits` bits."""

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        *,
        bits: int = STORED_BITS,
        activation_bits: int | None = None,
        group_size: int | None = None,
    ) -> BitSwitchLinear:
        """The module with its weight quantized to 8 bits."""
        codes, scale = quantize(module.weight.detach(), group_size=group_size)
        return cls(codes, scale, module.bias, bits=bits, activation_bits=activation_bits)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] of any floating dtype but float64, to [..., O]."""
        return self._linear(x)


class BitSwitchConv2d(_BitSwitch):
    """`nn.Conv2d` without groups over one stored weight, as a product with unfolded patches."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def from_float(
        cls, module: nn.Conv2d, *, bits: int = STORED_BITS, activation_bits: int | None = None
    ) -> BitSwitchConv2d:
        """The module with its weight quantized to 8 bits, one scale for each output channel.

        Raises:
            ValueError: a grouped convolution, or padding that is not zeros of a given size.
        """
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise ValueError(
                "tranche.bits.BitSwitchConv2d: expected groups == 1 and zero padding given in numbers, got "
                f"groups={module.groups}, padding={module.padding!r}, padding_mode={module.padding_mode!r}. "
                "Leave this module in floating point (skip=)."
            )
        codes, scale = quantize(module.weight.detach().flatten(1))
        made = cls(codes, scale, module.bias, bits=bits, activation_bits=activation_bits)
        for name in ("kernel_size", "stride", "padding", "dilation"):
            setattr(made, name, tuple(getattr(module, name)))
        return made

    def forward(self, x: Tensor) -> Tensor:
        """X [N, C, H, W] (or [C, H, W]) to [N, O, H', W']."""
        batched = x if x.dim() == 4 else x[None]
        patches = F.unfold(batched, self.kernel_size, self.dilation, self.padding, self.stride)
        y = self._linear(patches.transpose(1, 2)).transpose(1, 2)
        sizes = [
            (batched.size(2 + i) + 2 * self.padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        ]
        y = y.reshape(batched.size(0), self.out_features, *sizes)
        return y if x.dim() == 4 else y[0]


def _convertible(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def convert(
    model: nn.Module,
    *,
    skip: Sequence[str] = ("first", "last"),
    bits: int = STORED_BITS,
    activation_bits: int | None = None,
) -> nn.Module:
    """Replace the model's Linear and Conv2d modules by bit-switching ones, in place, and return it.

    Args:
        model: any module; its weights are quantized to 8 bits.
        skip: names of modules to leave alone (with all below them), and the words "first" and "last": the first
            and last module that would be converted stay in floating point.
        bits: the precision to start with.
        activation_bits: None, or 8 for integer activations.

    Raises:
        ValueError: a name in `skip` that no module has, or the model itself is a single layer.
    """
    names = [name for name, module in model.named_modules() if _convertible(module)]
    known = {name for name, _ in model.named_modules()}
    for name in skip:
        if name not in known and name not in ("first", "last"):
            raise ValueError(
                f"tranche.bits.convert: expected names of modules in skip, got {name!r}. See model.named_modules()."
            )
    skipped = {names[0 if word == "first" else -1] for word in ("first", "last") if word in skip and names}
    for name in names:
        below = any(name == prefix or name.startswith(prefix + ".") for prefix in skip)
        if below or name in skipped:
            continue
        if not name:
            raise ValueError(
                "tranche.bits.convert: expected a model that holds layers, got a single layer. "
                "Use BitSwitchLinear.from_float."
            )
        module = model.get_submodule(name)
        kind: Any = BitSwitchConv2d if isinstance(module, nn.Conv2d) else BitSwitchLinear
        made = kind.from_float(module, bits=bits, activation_bits=activation_bits).train(module.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    return model


def _assignment(model: nn.Module, bits: int | Mapping[str, int]) -> dict[_BitSwitch, int]:
    """Bits by module: one number for all, or the longest matching prefix of its name."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, _BitSwitch)}
    if isinstance(bits, int):
        return dict.fromkeys(modules.values(), _check_bits(bits))
    chosen = {}
    used = set()
    for name, module in modules.items():
        prefixes = [p for p in bits if p == "" or name == p or name.startswith(p + ".")]
        if prefixes:
            longest = max(prefixes, key=len)
            used |= set(prefixes)
            chosen[module] = _check_bits(bits[longest])
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
        ValueError: a number that is not 2 to 8, or a name that matches no such module.
    """
    for module, number in _assignment(model, bits).items():
        module.bits = number


@contextlib.contextmanager
def at_bits(model: nn.Module, bits: int | Mapping[str, int]) -> Iterator[None]:
    """Within this context, in this thread or task only, the model computes at these bits (as `set_bits` reads them).

    A compiled model does not see the context (torch.compile cannot guard on one): it recompiles once for each value
    that `set_bits` gives it.
    """
    override = {id(module): number for module, number in _assignment(model, bits).items()}
    token = _in_force.set({**(_in_force.get() or {}), **override})
    try:
        yield
    finally:
        _in_force.reset(token)


__all__ = ["BitSwitchConv2d", "BitSwitchLinear", "at_bits", "convert", "set_bits"]
