"""Modules over one stored weight, whose precision is chosen per call, per module, or within a context."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tranche.bits.activations import LearnedActivations
from tranche.bits.ops import int_linear, linear, pack, quantize
from tranche.bits.packed import STORED_BITS, Layout, PackedWeight
from tranche.bits.switch import Switchable


class _BitSwitch(Switchable):
    """What both modules share: packed data [O, I], scale, bias, and the precision.

    Attributes:
        bits: the precision, unless `at_bits` says otherwise.
        activation_bits: None, or 8 for integer activations.
        activations: None, or learned grids of activations at each precision, which stand in for activation_bits.
        stands_for: the kind of floating-point module that `from_float` takes.
    """

    stands_for: ClassVar[type[nn.Module]]
    _stay_float32 = ("scale", "bias")
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
        activations: LearnedActivations | None = None,
        layout: Layout = "guarded",
    ):
        super().__init__()
        if not (isinstance(codes, Tensor) and isinstance(scale, Tensor)):
            name, like = type(self).__name__, type(self).stands_for.__name__
            given = f"{codes!r}, {scale!r}" if isinstance(codes, int) and isinstance(scale, int) else "..."
            raise TypeError(
                f"tranche.bits.{name}: expected codes int8 [O, I] and scale as tensors, got "
                f"{type(codes).__name__} and {type(scale).__name__}. Use {name}.from_float(nn.{like}({given}))."
            )
        packed = pack(codes, layout=layout)
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self.layout = packed.layout
        self.bits = bits
        self.activation_bits = activation_bits
        self.activations = activations
        self.register_buffer("data", packed.data)
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    @classmethod
    def _expect_float(cls, module: object) -> None:
        if isinstance(module, cls.stands_for):
            return
        others = [kind for kind in (BitSwitchLinear, BitSwitchConv2d) if isinstance(module, kind.stands_for)]
        remedy = f"Use {others[0].__name__}.from_float." if others else "Leave this module as it is."
        raise TypeError(
            f"tranche.bits.{cls.__name__}.from_float: expected a module nn.{cls.stands_for.__name__}, got "
            f"{type(module).__name__}. {remedy}"
        )

    @property
    def packed(self) -> PackedWeight:
        """The weight as the functions of the family take it."""
        return PackedWeight(self.data, self.out_features, self.in_features, self.layout)

    def _linear(self, x: Tensor) -> Tensor:
        return linear(
            x, self.packed, self.scale, self.bits_in_force(), self.bias, activation_bits=self.activation_bits
        )

    def _learned_linear(self, codes: Tensor, present: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        """Codes [M, I] of activations c * step + offset, `present` [M or 1, I] being 0 where there is none (padding).

        sum of W_l * 2^(8-l) * scale * (c * step + offset), from two exact integer sums.
        """
        assert self.activations is not None
        step, offset = self.activations.grid(bits)
        sums = int_linear(torch.cat([codes * present, present]), self.packed, bits).float()
        products, counts = sums.split([codes.size(0), present.size(0)])
        y = (products * step + counts * offset) * (self.scale * 2 ** (STORED_BITS - bits))
        return (y if self.bias is None else y + self.bias).to(dtype)

    def get_extra_state(self) -> dict[str, int]:
        """Layout and shape go with the packed data."""
        return {"layout": self.layout, "out_features": self.out_features, "in_features": self.in_features}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Refuse data of a layout or shape that this module does not have."""
        own = self.get_extra_state()
        if state != own:
            raise ValueError(
                f"tranche.bits.{type(self).__name__}: expected packed data with {own}, got {state}. "
                "Unpack it with the version that packed it, and pack its codes with this one."
            )

    def extra_repr(self) -> str:
        """Shape and precision."""
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, activation_bits={self.activation_bits}, "
            f"bias={self.bias is not None}"
        )


def _nan_of_rows(x: Tensor) -> Tensor:
    """[..., 1]: NaN for the rows that hold one, else 0."""
    return torch.where(x.isnan().any(-1, keepdim=True), torch.nan, 0.0).to(x.dtype)


class BitSwitchLinear(_BitSwitch):
    """`nn.Linear` over one stored weight: x [..., I] to [..., O] at `bits` bits.

    `from_float` makes one of an `nn.Linear`; the constructor takes codes that are there already.

    Args:
        codes: int8 [O, I], as `quantize` makes them; packed here.
        scale: float32 [O], or [O, I / group_size], as `quantize` makes it.
        bias: [O], kept in float32.
        bits: the precision to start with, 2 to 8.
        activation_bits: None keeps inputs in floating point; 8 quantizes them by row and sums integers.
        activations: learned grids of inputs at each precision, in place of activation_bits.
        layout: of the packed weight, as `pack` takes it.

    Raises:
        TypeError: codes or scale that are no tensors.
        ValueError: a wrong shape, dtype, layout or number of bits.
    """

    stands_for = nn.Linear

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        *,
        bits: int = STORED_BITS,
        activation_bits: int | None = None,
        group_size: int | None = None,
        layout: Layout = "guarded",
    ) -> BitSwitchLinear:
        """The module with its weight quantized to 8 bits.

        Args:
            module: its weight is copied; it is not changed.
            bits: the precision to start with, 2 to 8.
            activation_bits: None keeps inputs in floating point; 8 quantizes them by row and sums integers.
            group_size: inputs that share a scale, a multiple of 32 that divides I: finer scales, closer weights. One
                scale for each output channel when left out.
            layout: of the packed weight, as `pack` takes it.

        Raises:
            TypeError: not an `nn.Linear`.
            ValueError: a wrong group size, layout or number of bits.
        """
        cls._expect_float(module)
        codes, scale = quantize(module.weight.detach(), group_size=group_size)
        return cls(codes, scale, module.bias, bits=bits, activation_bits=activation_bits, layout=layout)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] of any floating dtype but float64, to [..., O]."""
        if self.activations is None:
            return self._linear(x)
        bits = self.bits_in_force()
        codes = self.activations.codes(x, bits).reshape(-1, self.in_features)
        y = self._learned_linear(codes, codes.new_ones(1, self.in_features), bits, x.dtype)
        y = y + _nan_of_rows(x).reshape(-1, 1)  # codes cannot say it
        return y.view(*x.shape[:-1], self.out_features)


def conv_sizes(module: Any, x: Tensor) -> list[int]:
    """Height and width of what a convolution makes of x [N, C, H, W]."""
    return [
        (x.size(2 + i) + 2 * module.padding[i] - module.dilation[i] * (module.kernel_size[i] - 1) - 1)
        // module.stride[i]
        + 1
        for i in range(2)
    ]


class BitSwitchConv2d(_BitSwitch):
    """`nn.Conv2d` without groups over one stored weight, as a product with unfolded patches.

    `from_float` makes one of an `nn.Conv2d`. The constructor takes codes and scale as `BitSwitchLinear`'s does, an
    input being a channel at a place of the kernel; it leaves kernel_size, stride, padding and dilation to the caller.

    Args:
        codes: int8 [O, C * kh * kw], the weight [O, C, kh, kw] flattened.
        scale: float32 [O].
        bias: [O], kept in float32.
        bits: the precision to start with, 2 to 8.
        activation_bits: None keeps inputs in floating point; 8 quantizes each patch and sums integers.
        activations: learned grids of inputs at each precision, in place of activation_bits.
        layout: of the packed weight, as `pack` takes it.

    Raises:
        TypeError: codes or scale that are no tensors.
        ValueError: a wrong shape, dtype, layout or number of bits.
    """

    stands_for = nn.Conv2d

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def from_float(
        cls,
        module: nn.Conv2d,
        *,
        bits: int = STORED_BITS,
        activation_bits: int | None = None,
        layout: Layout = "guarded",
    ) -> BitSwitchConv2d:
        """The module with its weight quantized to 8 bits, one scale for each output channel.

        Args:
            module: its weight is copied; it is not changed.
            bits: the precision to start with, 2 to 8.
            activation_bits: None keeps inputs in floating point; 8 quantizes each patch and sums integers.
            layout: of the packed weight, as `pack` takes it.

        Raises:
            TypeError: not an `nn.Conv2d`.
            ValueError: a grouped convolution, padding that is not zeros of a given size, or a wrong layout or number of
                bits.
        """
        cls._expect_float(module)
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise ValueError(
                "tranche.bits.BitSwitchConv2d: expected groups == 1 and zero padding given in numbers, got "
                f"groups={module.groups}, padding={module.padding!r}, padding_mode={module.padding_mode!r}. "
                "Leave this module in floating point (skip=)."
            )
        codes, scale = quantize(module.weight.detach().flatten(1))
        made = cls(codes, scale, module.bias, bits=bits, activation_bits=activation_bits, layout=layout)
        for name in ("kernel_size", "stride", "padding", "dilation"):
            setattr(made, name, tuple(getattr(module, name)))
        return made

    def _patches(self, x: Tensor) -> Tensor:
        return F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """X [N, C, H, W] (or [C, H, W]) to [N, O, H', W']."""
        batched = x if x.dim() == 4 else x[None]
        if self.activations is None:
            y = self._linear(self._patches(batched).transpose(1, 2))
        else:
            bits = self.bits_in_force()
            # unfold wants floats; codes are small enough to be exact in any
            codes = self.activations.codes(batched, bits).to(x.dtype)
            rows, present = (
                self._patches(part).transpose(1, 2).to(torch.int8)
                for part in (codes, torch.ones_like(codes[:1]))
            )
            present = present.expand_as(rows).reshape(-1, self.in_features)
            y = self._learned_linear(rows.reshape(-1, self.in_features), present, bits, x.dtype)
            y = y.view(batched.size(0), -1, self.out_features) + _nan_of_rows(
                self._patches(batched).transpose(1, 2)
            )
        y = y.transpose(1, 2)
        y = y.reshape(batched.size(0), self.out_features, *conv_sizes(self, batched))
        return y if x.dim() == 4 else y[0]


def convertible(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def skipped_names(model: nn.Module, skip: Sequence[str]) -> set[str]:
    """The Linear and Conv2d modules of the model that `skip` names, by themselves, by a parent, or by place."""
    names = [name for name, module in model.named_modules() if convertible(module)]
    known = {name for name, _ in model.named_modules()}
    for name in skip:
        if name not in known and name not in ("first", "last"):
            raise ValueError(
                f"tranche.bits.convert: expected names of modules in skip, got {name!r}. See model.named_modules()."
            )
    placed = {names[0 if word == "first" else -1] for word in ("first", "last") if word in skip and names}
    return placed | {n for n in names if any(n == prefix or n.startswith(prefix + ".") for prefix in skip)}


def convert(
    model: nn.Module,
    *,
    skip: Sequence[str] = ("first", "last"),
    bits: int = STORED_BITS,
    activation_bits: int | None = None,
    layout: Layout = "guarded",
) -> nn.Module:
    """Replace the model's Linear and Conv2d modules by bit-switching ones, in place, and return it.

    Args:
        model: any module; its weights are quantized to 8 bits.
        skip: names of modules to leave alone (with all below them), and the words "first" and "last": the first
            and last module that would be converted stay in floating point.
        bits: the precision to start with.
        activation_bits: None, or 8 for integer activations.
        layout: of the packed weights, as `pack` takes it.

    Raises:
        ValueError: a name in `skip` that no module has, a wrong layout, or a model that is itself a single layer. When
            there is nothing to convert, a warning says why.
    """
    if convertible(model):
        kind: Any = BitSwitchConv2d if isinstance(model, nn.Conv2d) else BitSwitchLinear
        raise ValueError(
            "tranche.bits.convert: expected a model that holds layers, got a single layer. "
            f"Use {kind.__name__}.from_float."
        )
    skipped = skipped_names(model, skip)
    layers = [name for name, module in model.named_modules() if convertible(module)]
    chosen = [name for name in layers if name not in skipped]
    if not chosen:
        why = f"skip leaves out all of {layers}; skip=() converts them" if layers else "it has no such layer"
        warnings.warn(f"tranche.bits.convert: {type(model).__name__} stays as it is: {why}.", stacklevel=2)
    for name in chosen:
        module = model.get_submodule(name)
        kind = BitSwitchConv2d if isinstance(module, nn.Conv2d) else BitSwitchLinear
        made = kind.from_float(module, bits=bits, activation_bits=activation_bits, layout=layout)
        made.train(module.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    return model


__all__ = ["BitSwitchConv2d", "BitSwitchLinear", "convert"]
