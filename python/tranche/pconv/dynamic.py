"""DPConv: partial convolutions whose ratio is learned (PartialNet, arXiv 2502.01303)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tranche.pconv.modules import PartialConv
from tranche.pconv.ops import partial_conv2d


class _Step(torch.autograd.Function):
    """1 where the gate is not negative, else 0; to gradients it is (gate + 1) / 2, clamped to [0, 1]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        return (gate >= 0).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate,) = ctx.saved_tensors
        return torch.where(gate.abs() < 1, grad / 2, 0)


class DPConv(nn.Module):
    """A convolution that learns which part of the channels it is of: dim / n_div, n_div a power of two.

    K = log2(dim) gates, with s_i the step of gate i, make the mask of the weight
        U = kron_i (s_i * ones(2, 2) + (1 - s_i) * I_2),   n_div = 2 ** (number of s_i = 0).
    In training all channels are convolved with weight * U, groups of dim / n_div when the zeros come first, which
    `order_loss` asks for. In evaluation the first dim / n_div channels are convolved and the others pass through. The
    two agree on those first channels alone: a search ends with `freeze` and training of what it returns.

    Reading `n_div`, as evaluation does, waits for the gates' device.

    Args:
        dim: channels C of the input [B, C, H, W], a power of two from 2.
        kernel_size: odd; height and width stay.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim & (dim - 1):
            raise ValueError(
                f"tranche.DPConv: expected dim to be a power of two from 2, got {dim}. Its gates halve the "
                "channels; use PartialConv for other widths."
            )
        if kernel_size % 2 == 0:
            raise ValueError(
                f"tranche.DPConv: expected an odd kernel_size, got {kernel_size}. An even one changes the size."
            )
        self.dim = dim
        self.conv = nn.Conv2d(
            dim, dim, kernel_size, 1, kernel_size // 2, bias=False, device=device, dtype=dtype
        )
        self.gate = nn.Parameter(torch.empty(dim.bit_length() - 1, device=device, dtype=dtype))
        self.reset_gates()

    def reset_gates(self) -> None:
        """Gates of a random sign, near to changing it."""
        with torch.no_grad():
            self.gate.copy_(torch.randint_like(self.gate, 0, 2).mul_(2).sub_(1).mul_(1e-8))

    def steps(self) -> Tensor:
        """s [K], zeros and ones with a straight-through gradient."""
        return _Step.apply(self.gate)

    def mask(self) -> Tensor:
        """U [dim, dim]."""
        s = self.steps()
        eye = torch.eye(2, dtype=s.dtype, device=s.device)
        mask = s.new_ones(1, 1)
        for i in range(s.numel()):
            mask = torch.kron(mask, s[i] + (1 - s[i]) * eye)
        return mask

    @property
    def n_div(self) -> int:
        """One in n_div channels is convolved in evaluation."""
        return 2 ** int((self.gate < 0).sum())

    def order_loss(self) -> Tensor:
        """Zero if no s_i = 0 comes after an s_j = 1; else the sum of |gate| from the first such i on."""
        s = self.steps().detach()
        late = (1 - s) * (s.cumsum(0) > 0)
        return (self.gate.abs() * (late.cumsum(0) > 0)).sum()

    def resource(self) -> Tensor:
        """R: the ones of U, pairs of channels that the convolution connects in training, 2 ** (K + sum_i s_i)."""
        return 2.0 ** (self.gate.numel() + self.steps().sum())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape and memory format."""
        weight, padding = self.conv.weight, self.conv.kernel_size[0] // 2
        if self.training:
            return partial_conv2d(x, weight * self.mask()[:, :, None, None], padding=padding)
        width = self.dim // self.n_div
        return partial_conv2d(x, weight[:width, :width], padding=padding)

    def freeze(self) -> PartialConv:
        """The partial convolution of the ratio found, with a copy of the weight's first block."""
        weight, n_div = self.conv.weight, self.n_div
        frozen = PartialConv(self.dim, n_div, weight.size(-1), device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            frozen.partial_conv3.weight.copy_(weight[: frozen.dim_conv3, : frozen.dim_conv3])
        return frozen.train(self.training)


def _searched(function: str, model: nn.Module) -> list[DPConv]:
    found = [module for module in model.modules() if isinstance(module, DPConv)]
    if not found:
        raise ValueError(
            f"tranche.pconv.{function}: expected a model with DPConv modules, got none. Build it with search=True."
        )
    return found


def order_loss(model: nn.Module) -> Tensor:
    """The sum of the `order_loss` of all DPConv modules of a model; to be added to the task's loss."""
    return torch.stack([module.order_loss() for module in _searched("order_loss", model)]).sum()


def resource_penalty(model: nn.Module, target: float, exponent: float = -0.01) -> Tensor:
    """(T / R) ** exponent where R > T, else 1; the task's loss is to be multiplied by it.

    Args:
        model: one with DPConv modules; R is the sum of their `resource`.
        target: T, such as `resource_at(model, 4)`.
    """
    resource = torch.stack([module.resource() for module in _searched("resource_penalty", model)]).sum()
    return (target / resource.clamp(min=target)) ** exponent


def freeze(model: nn.Module) -> dict[str, int]:
    """Put the partial convolution of the found ratio in the place of every DPConv, in place.

    Returns:
        The n_div of each, by its module's name.
    """
    ratios = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, DPConv):
            if not path:
                raise ValueError(
                    "tranche.pconv.freeze: expected a model around DPConv modules, got one. Use its freeze()."
                )
            ratios[path] = module.n_div
            model.set_submodule(path, module.freeze())
    return ratios


def resource_at(model: nn.Module, n_div: int) -> float:
    """The R of a model all of whose DPConv modules are at this n_div: a target for `resource_penalty`."""
    return sum(module.dim**2 for module in _searched("resource_at", model)) / n_div
