"""Modules to train for several precisions at once, which convert exactly to the integer modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tranche.bits.activations import LearnedActivations
from tranche.bits.fake_quantize import fake_quantize
from tranche.bits.modules import BitSwitchConv2d, BitSwitchLinear, conv_sizes, convertible, skipped_names
from tranche.bits.ops import quantize, quantize_activations
from tranche.bits.switch import Switchable, at_bits

Activations = Literal[None, 8, "learned"]


class _QAT(Switchable):
    """A weight, the scale it is learned with, and how its inputs are quantized."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    integer: Any  # the module it converts to

    def __init__(self, module: nn.Linear | nn.Conv2d, precisions: Sequence[int], activations: Activations):
        super().__init__()
        self.register_parameter("weight", cast(nn.Parameter, module.weight))
        self.register_parameter("bias", cast("nn.Parameter | None", module.bias))
        _, scale = quantize(self.weight.detach().flatten(1))
        self.scale = nn.Parameter(scale)
        self.activation_bits = activations if activations == 8 else None
        self.activations = LearnedActivations(precisions) if activations == "learned" else None

    def quantized_weight(self) -> Tensor:
        """The weight on the grid of the bits in force, with gradients to weight and scale."""
        return fake_quantize(self.weight, self.scale, self.bits_in_force())

    def _inputs(self, x: Tensor) -> Tensor:
        if self.activations is not None:
            return self.activations(x, self.bits_in_force())
        if self.activation_bits == 8:
            codes, scale, _ = quantize_activations(x.detach())
            return x + (codes * scale - x).detach()
        return x

    def _arguments(self) -> dict[str, Any]:
        codes, scale = quantize(self.weight.detach().flatten(1), scale=self.scale.detach())
        grids = copy.deepcopy(self.activations)
        return {
            "codes": codes,
            "scale": scale,
            "bias": self.bias,
            "bits": self.bits,
            "activation_bits": self.activation_bits,
            "activations": grids and grids.requires_grad_(False),
        }


class QATLinear(_QAT):
    """`nn.Linear` computed as `BitSwitchLinear` will, in floating point and with gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] to [..., O]."""
        return F.linear(self._inputs(x), self.quantized_weight(), self.bias)

    def to_integer(self) -> BitSwitchLinear:
        """The integer module that computes the same."""
        return BitSwitchLinear(**self._arguments())


class QATConv2d(_QAT):
    """`nn.Conv2d` without groups, computed as `BitSwitchConv2d` will, in floating point and with gradients."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __init__(self, module: nn.Conv2d, precisions: Sequence[int], activations: Activations):
        super().__init__(module, precisions, activations)
        for name in ("kernel_size", "stride", "padding", "dilation"):
            setattr(self, name, tuple(getattr(module, name)))

    def forward(self, x: Tensor) -> Tensor:
        """X [N, C, H, W] to [N, O, H', W']."""
        weight = self.quantized_weight()
        if self.activation_bits is None:
            return F.conv2d(self._inputs(x), weight, self.bias, self.stride, self.padding, self.dilation)
        # the integer product quantizes patch by patch
        patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride).transpose(1, 2)
        y = F.linear(self._inputs(patches), weight.flatten(1), self.bias).transpose(1, 2)
        return y.reshape(x.size(0), weight.size(0), *conv_sizes(self, x))

    def to_integer(self) -> BitSwitchConv2d:
        """The integer module that computes the same."""
        made = BitSwitchConv2d(**self._arguments())
        for name in ("kernel_size", "stride", "padding", "dilation"):
            setattr(made, name, getattr(self, name))
        return made


class SwitchBatchNorm(Switchable):
    """One BatchNorm for each precision: statistics of 2-bit layers are not those of 8-bit ones."""

    def __init__(self, module: nn.BatchNorm1d | nn.BatchNorm2d, precisions: Sequence[int]):
        super().__init__()
        kind = type(module)
        self.norms = nn.ModuleDict()
        for bits in precisions:
            norm = kind(module.num_features, module.eps, module.momentum, module.affine)
            norm.load_state_dict(module.state_dict())
            self.norms[str(bits)] = norm

    def forward(self, x: Tensor) -> Tensor:
        """X normalized as the precision in force does it."""
        bits = str(self.bits_in_force())
        if bits not in self.norms:
            raise ValueError(
                f"tranche.bits.SwitchBatchNorm: expected bits in {list(self.norms)}, got {bits}. "
                "Name every precision to be used in prepare_qat(precisions=...)."
            )
        return self.norms[bits](x)


def prepare_qat(
    model: nn.Module,
    *,
    precisions: Sequence[int] = (8, 6, 4, 2),
    activations: Activations = None,
    skip: Sequence[str] = ("first", "last"),
) -> nn.Module:
    """Replace Linear, Conv2d and BatchNorm modules by ones to train at several precisions, in place, and return it.

    Args:
        model: any module; its parameters stay the same objects.
        precisions: bits to train at.
        activations: None keeps inputs in floating point, 8 quantizes them by row as the integer product does,
            "learned" learns a grid for each precision, of as many bits as the weights (then call `calibrate`).
        skip: Linear and Conv2d modules to leave in floating point, as `convert` takes it.

    Raises:
        ValueError: a name in `skip` that no module has.
    """
    skipped = skipped_names(model, skip)
    for name, module in list(model.named_modules()):
        made: nn.Module
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            made = SwitchBatchNorm(module, precisions)
        elif not convertible(module) or name in skipped:
            continue
        elif isinstance(module, nn.Conv2d):
            made = QATConv2d(module, precisions, activations)
        else:
            made = QATLinear(module, precisions, activations)
        made.train(module.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
    return model


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor, precisions: Sequence[int]) -> None:
    """Start the model's learned grids of activations from what a batch brings, at every precision."""
    grids = [module for module in model.modules() if isinstance(module, LearnedActivations)]
    training = model.training
    model.eval()
    try:
        for grid in grids:
            grid.calibrating = True
        for bits in precisions:
            with at_bits(model, bits):
                model(x)
    finally:
        for grid in grids:
            grid.calibrating = False
        model.train(training)


def convert_qat(model: nn.Module) -> nn.Module:
    """Replace the model's QAT modules by the integer modules that compute the same, in place, and return it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QATLinear | QATConv2d):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.to_integer().train(module.training))
    return model


__all__ = [
    "QATConv2d",
    "QATLinear",
    "SwitchBatchNorm",
    "calibrate",
    "convert_qat",
    "prepare_qat",
]
