"""Random layers and the rule by which results are judged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tranche.moe import draft_moe, draft_moe_star, fused_experts, reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def judge(got: Tensor, want: Tensor, plain: Tensor | None = None) -> None:
    """`got` is no more than twice as wrong as the same in plain torch, plus one rounding of the largest value."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return
    largest = float(want.abs().max())
    allowed = (largest + 1e-3) * torch.finfo(got.dtype).eps
    if got.dtype == torch.float64:  # the reference is no better
        allowed *= 1000
    elif plain is not None:
        allowed += 2 * float((plain.double() - want).abs().max())
    error = float((got.double() - want).abs().max())
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert a.dtype == b.dtype
    assert torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@dataclass
class Layer:
    """The tensors of one call of fused_experts."""

    x: Tensor
    w_gate: Tensor | None
    w_up: Tensor
    w_down: Tensor
    weights: Tensor
    ids: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.w_gate, self.w_up, self.w_down, self.weights, self.ids

    def run(self, **extra: Any) -> Tensor:
        return fused_experts(*self.tensors(), **self.options, **extra)

    def reference(self, **extra: Any) -> Tensor:
        return reference.fused_experts(*self.tensors(), **self.options, **extra)

    def check(self, **extra: Any) -> None:
        plain = self.reference(compute_dtype=self.x.dtype)
        judge(self.run(**extra), self.reference(), plain)

    def some(self, rows: slice | list[int]) -> Layer:
        return replace(
            self, x=self.x[rows], weights=self.weights[rows].contiguous(), ids=self.ids[rows].contiguous()
        )


def random_ids(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    return torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k].int().contiguous()


def make_layer(
    seed: int = 0,
    *,
    tokens: int = 5,
    hidden: int = 48,
    inner: int = 40,
    experts: int = 4,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    gated: bool = True,
    device: str = "cpu",
    integers: bool = False,
    **options: Any,
) -> Layer:
    """A random layer; with `integers` all values are small integers, and so are the results."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype).to(device)
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    x = draw(tokens, hidden)
    w_gate = draw(experts, inner, hidden, scale=hidden**-0.5) if gated else None
    w_up = draw(experts, inner, hidden, scale=hidden**-0.5)
    w_down = draw(experts, hidden, inner, scale=inner**-0.5)
    ids = random_ids(tokens, experts, top_k, generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(tokens, top_k, generator=generator).to(wide)
    if integers:
        weights = torch.randint(-2, 3, (tokens, top_k), generator=generator).to(wide)
    return Layer(x, w_gate, w_up, w_down, weights.to(device), ids.to(device), options)


@dataclass
class Head:
    """The tensors of one call of draft_moe."""

    x: Tensor
    router: Tensor
    w_gate: Tensor | None
    w_up: Tensor
    w_down: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.router, self.w_gate, self.w_up, self.w_down

    def run(self, **extra: Any) -> Any:
        return draft_moe(*self.tensors(), **self.options, **extra)

    def reference(self, **extra: Any) -> Any:
        return reference.draft_moe(*self.tensors(), **self.options, **extra)

    def star(self) -> tuple[Tensor, Tensor]:
        return draft_moe_star(self.x, self.router, self.w_up, self.w_down)

    def far_from_ties(self, gap: float = 0.05) -> Tensor:
        """Rows whose contrast logits, and whose chosen logits, do not depend on rounding."""
        logits = self.x.double() @ self.router.double().T
        experts = self.w_up.shape[0] if self.router.shape[0] > 2 else 0
        contrast = (logits[:, experts] - logits[:, experts + 1]).abs() > gap
        ordered = logits[:, : max(experts, 2)].sort(-1).values
        return contrast & (ordered.diff(dim=-1) > gap).all(-1)


def make_head(
    seed: int = 0,
    *,
    tokens: int = 5,
    hidden: int = 48,
    inner: int | None = None,
    experts: int = 2,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    gated: bool = True,
    residual: bool = False,
    device: str = "cpu",
    **options: Any,
) -> Head:
    """A random draft head."""
    layer = make_layer(
        seed,
        tokens=tokens,
        hidden=hidden,
        inner=inner or hidden,
        experts=experts,
        top_k=1,
        dtype=dtype,
        gated=gated,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    router = torch.randn(experts + 2 if rows is None else rows, hidden, generator=generator) * hidden**-0.5
    if residual:
        options["residual"] = torch.randn(tokens, hidden, generator=generator).to(dtype).to(device)
    tensors = (layer.x, router.to(dtype), layer.w_gate, layer.w_up, layer.w_down)
    return Head(*(None if t is None else t.to(device) for t in tensors), options)
