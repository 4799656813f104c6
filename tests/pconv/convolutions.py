"""Random convolutions of a slice of channels, and the rule by which results are judged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tranche.pconv import reference


@dataclass
class Case:
    """One call of a function of the family."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, function: Any) -> Any:
        return function(self.x, self.weight, self.bias, **self.options)

    def wider(self, dtype: torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, x=self.x.to(dtype), weight=self.weight.to(dtype), bias=bias)

    @property
    def slice(self) -> slice:
        start = self.options.get("start", 0)
        return slice(start, start + self.weight.size(1) * self.options.get("groups", 1))


def make_case(
    seed: int = 0,
    *,
    shape: tuple[int, int, int, int] = (2, 24, 9, 7),
    width: int = 8,
    out: int | None = None,
    kernel: tuple[int, int] = (3, 3),
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    device: str = "cpu",
    integers: bool = False,
    **options: Any,
) -> Case:
    """A case whose padding keeps the size, unless `padding` is given."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, size, generator=generator).to(dtype)
        return torch.randn(*size, generator=generator).to(dtype)

    dilation = options.get("dilation", 1)
    options.setdefault("padding", tuple((k - 1) * dilation // 2 for k in kernel))
    c_out = width if out is None else out
    x = draw(*shape)
    weight = draw(c_out, width // options.get("groups", 1), *kernel)
    if not integers:
        weight = weight / (weight[0].numel() or 1) ** 0.5
    x = x.to(device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return Case(x, weight.to(device), draw(c_out).to(device) if bias else None, options)


def assert_correct(case: Case, got: Tensor, name: str) -> None:
    """As near to the fp64 reference as twice plain torch's error in the same dtype, plus one rounding."""
    function = getattr(reference, name)
    want = case.wider(torch.float64).run(function)
    plain = case.run(function)
    assert got.dtype == case.x.dtype and got.shape == want.shape
    if got.numel() == 0:
        return
    error = (got.double() - want).abs().max()
    yardstick = (plain.double() - want).abs().max()
    # the reference is fp64 itself, and no nearer to the truth than an fp64 kernel; and plain torch may sum a short
    # row with less error than any fixed order has
    roundings = 32 if got.dtype == torch.float64 else 4 if got.dtype == torch.float32 else 1
    assert error <= 2 * yardstick + roundings * torch.finfo(got.dtype).eps * want.abs().max(), (
        error,
        yardstick,
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit; -0.0 differs from 0.0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
