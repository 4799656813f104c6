"""Typed functions of the family; each calls the raw op of flat tensors behind it.

Calls that need no gradient go straight to the op; others pass through `tranche.moe.autograd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from tranche import _library
from tranche.bits.packed import GUARDED_PLANES, STORED_BITS
from tranche.moe.packed import PackedExperts

SCORES = ("softmax", "sigmoid", "relu_rms")
ACTIVATIONS = ("silu", "gelu", "relu")
VARIANTS = ("jakiro", "topk", "star")
MAX_EXPERTS = 1024  # csrc/moe/moe_glue.h checks it
Score = Literal["softmax", "sigmoid", "relu_rms"]
Activation = Literal["silu", "gelu", "relu"]
Variant = Literal["jakiro", "topk"]

_T = TypeVar("_T")


def _index(op: str, argument: str, name: _T, names: Sequence[_T]) -> int:
    if name not in names:
        raise ValueError(
            f"tranche.{op}: expected {argument} in {tuple(names)}, got {name!r}. Name one of these."
        )
    return names.index(name)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def route(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    *,
    score: Score = "softmax",
    renormalize: bool = True,
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    rms_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Each token's best experts and their weights.

    logits = x @ weight.T, in fp32. Infinite logits count as the largest finite number. A NaN logit has score 0 and
    ranks last, so that ids are always unique and in range, and weights finite.

    Args:
        x: [T, H]; float32, float16 or bfloat16 (float64 on the CPU). Contiguous last dimension.
        weight: [E, H] in the dtype of x; E <= 1024.
        top_k: K, at most E, and at most the experts in the kept groups.
        score: softmax over the experts, sigmoid, or relu_rms: RMSNorm(ReLU(logits)) * rms_weight, where inactive
            experts have weight 0 (BlockFFN, https://arxiv.org/abs/2507.08771).
        renormalize: divide a token's weights by their sum; weights whose sum is 0 become 0.
        bias: float32 [E], added to the scores for the choice only (DeepSeek-V3, https://arxiv.org/abs/2412.19437,
            equation 16).
        groups: the experts are this many runs of equal length.
        top_groups: only the experts of this many groups may be chosen: of those with the largest sum of their two
            best (biased) scores.
        scale: multiplies the weights at the end.
        rms_weight: float32 [E], for relu_rms; ones when left out.
        eps: of the root mean square.

    Returns:
        weights: float32 [T, K] (float64 if x is). Differentiable in x, weight and rms_weight.
        ids: int32 [T, K], by descending (biased) score, ties to the lower id.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or number.
    """
    code = _index("moe_route", "score", score, SCORES)
    options = (top_k, code, renormalize, bias, groups, top_groups, scale)
    if _needs_grad(x, weight, rms_weight):
        from tranche.moe.autograd import Route

        return Route.apply(x, weight, rms_weight, options, eps)
    return _library.ops().moe_route.default(x, weight, *options, rms_weight, eps)


@_library.register_fake("moe_route")
def _(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    score: int = 0,
    renormalize: bool = True,
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    rms_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=_weights_dtype(x)), x.new_empty(shape, dtype=torch.int32)


def _weights_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class RoutingPlan:
    """Which tokens each expert serves, on the device; made once, it serves every layer with the same ids (Read-ME).

    Slot t * K + k is the k-th choice of token t.

    Attributes:
        offsets: int32 [E + 1]; expert e serves slots[offsets[e] : offsets[e + 1]].
        slots: int32 [T * K], ascending within each expert.
    """

    offsets: Tensor
    slots: Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1

    @property
    def counts(self) -> Tensor:
        """int32 [E]: choices that fell on each expert."""
        return self.offsets.diff()

    @classmethod
    def from_ids(cls, topk_ids: Tensor, num_experts: int) -> RoutingPlan:
        """The plan of ids int32 [T, K].

        Raises:
            ValueError: a wrong shape, dtype or number.
            IndexError: on the CPU, an id outside [0, num_experts); elsewhere it is left out.
        """
        return cls(*_library.ops().moe_plan(topk_ids, num_experts))


@_library.register_fake("moe_plan")
def _(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return topk_ids.new_empty(num_experts + 1), topk_ids.new_empty(topk_ids.shape[0] * topk_ids.shape[1])


def _expect(condition: bool, expected: str, got: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"tranche.moe_experts: expected {expected}, got {got}. {remedy}")


_Stack = Tensor | PackedExperts | None
_Flat = tuple[Tensor | None, Tensor | None, Tensor | None]


def _expect_packed(name: str, stack: _Stack, up: PackedExperts, shape: tuple[int, int]) -> PackedExperts:
    if not isinstance(stack, PackedExperts):
        raise ValueError(
            f"tranche.moe_experts: expected packed {name}, as w_up is, got {type(stack).__name__}. "
            "tranche.moe.pack_experts makes one."
        )
    got = (stack.out_features, stack.in_features)
    _expect(
        got == shape, f"{name} of {list(shape)} features an expert", list(got), "x and w_up give the sizes."
    )
    _expect(
        stack.layout == up.layout, f"{name} in layout {up.layout}, as w_up is", stack.layout, "Pack it again."
    )
    return stack


def _unpacked(
    x: Tensor, w_gate: _Stack, up: PackedExperts, w_down: _Stack, scales: _Flat
) -> tuple[_Flat, _Flat]:
    """Data and scales of gate, up and down."""
    given = next((n for n, s in zip(("gate", "up", "down"), scales, strict=True) if s is not None), None)
    _expect(given is None, f"no w_{given}_scale for packed experts", "one", "They have their own.")
    hidden, inner = x.size(-1), up.out_features
    gate = None if w_gate is None else _expect_packed("w_gate", w_gate, up, (inner, hidden))
    _expect_packed("w_up", up, up, (inner, hidden))
    down = _expect_packed("w_down", w_down, up, (hidden, inner))
    if gate is None:
        return (None, up.data, down.data), (None, up.scale, down.scale)
    return (gate.data, up.data, down.data), (gate.scale, up.scale, down.scale)


def fused_experts(
    x: Tensor,
    w_gate: Tensor | PackedExperts | None,
    w_up: Tensor | PackedExperts,
    w_down: Tensor | PackedExperts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: Activation = "silu",
    w_gate_scale: Tensor | None = None,
    w_up_scale: Tensor | None = None,
    w_down_scale: Tensor | None = None,
    bits: int | None = None,
    plan: RoutingPlan | None = None,
) -> Tensor:
    """The weighted sum of each token's experts: sum over k of topk_weights[t, k] * expert[topk_ids[t, k]](x[t]).

    An expert is w_down @ (act(w_gate @ x) * (w_up @ x)), or w_down @ act(w_up @ x) without w_gate. Only the weights
    of experts with tokens are read. Sums are fp32, by ascending expert; a weight of exactly 0 leaves its expert out,
    whatever that yields. Packed experts are read at `bits` bits, of which switching costs nothing, and no others; their
    integers meet x as they are, and the scale of a row multiplies its sum.

    Args:
        x: [T, H]; float32, float16 or bfloat16 (float64 on the CPU, unless experts are packed). Contiguous last
            dimension.
        w_gate: [E, I, H] or None; any strides but a contiguous last dimension, so that halves of a fused
            gate_up_proj [E, 2I, H] are passed as views. The dtype of x, or int8 with scales; or what `pack_experts`
            made of it, as then all three are.
        w_up: [E, I, H], likewise.
        w_down: [E, H, I], likewise.
        topk_weights: float32 [T, K] (float64 if x is).
        topk_ids: int32 [T, K].
        activation: silu, gelu (the exact one, by erf) or relu.
        w_gate_scale: float32 [E, I], what the rows of int8 weights are multiplied with.
        w_up_scale: float32 [E, I].
        w_down_scale: float32 [E, H].
        bits: 2 to 8, of packed experts; 8 when left out.
        plan: the plan of these very ids, if it is at hand.

    Returns:
        [T, H], contiguous. Differentiable in x, the weights and topk_weights, unless weights are integers; experts
        without tokens get zero gradients.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or number.
        IndexError: on the CPU, an id that is no expert's, or a plan of other ids; elsewhere (but under
            TRANCHE_CHECK=1) such an id is left out.
    """
    code = _index("moe_experts", "activation", activation, ACTIVATIONS)
    scales: _Flat = (w_gate_scale, w_up_scale, w_down_scale)
    listed = (None, None) if plan is None else (plan.offsets, plan.slots)
    layout = GUARDED_PLANES
    if isinstance(w_up, PackedExperts):
        matrices, scales = _unpacked(x, w_gate, w_up, w_down, scales)
        bits, layout = STORED_BITS if bits is None else bits, w_up.layout
    else:
        _expect(bits is None, "no bits for weights that are not packed", bits, "Pack them with pack_experts.")
        if isinstance(w_gate, PackedExperts) or isinstance(w_down, PackedExperts):
            raise ValueError(
                "tranche.moe_experts: expected packed w_up, as another is, got a Tensor. "
                "tranche.moe.pack_experts makes one."
            )
        matrices = (w_gate, w_up, w_down)
    if _needs_grad(x, *matrices, topk_weights):
        if scales[1] is not None:
            raise ValueError(
                "tranche.moe_experts: expected weights of integers without gradients, got an input that requires "
                "them. Call it under torch.no_grad(), or keep the weights in floating point."
            )
        from tranche.moe.autograd import Experts

        return Experts.apply(x, *matrices, topk_weights, topk_ids, code, *listed)
    return _library.ops().moe_experts.default(
        x, *matrices, topk_weights, topk_ids, code, *scales, *listed, bits, layout
    )


@_library.register_fake("moe_experts")
def _(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: int = 0,
    w_gate_scale: Tensor | None = None,
    w_up_scale: Tensor | None = None,
    w_down_scale: Tensor | None = None,
    offsets: Tensor | None = None,
    slots: Tensor | None = None,
    bits: int | None = None,
    layout: int = GUARDED_PLANES,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _draft(
    x: Tensor,
    router: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    top_k: int,
    contrast: bool,
    residual: Tensor | None,
    variant: int,
    activation: int,
) -> tuple[Tensor, Tensor]:
    if _needs_grad(x, router, w_gate, w_up, w_down, residual):
        from tranche.moe.autograd import Draft

        return Draft.apply(x, router, w_gate, w_up, w_down, residual, (top_k, contrast, variant, activation))
    first, second, _, _ = _library.ops().moe_draft.default(
        x, router, w_gate, w_up, w_down, top_k, contrast, residual, variant, activation
    )
    return first, second


def draft_moe(
    x: Tensor,
    router: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    *,
    top_k: int = 2,
    contrast: bool = False,
    residual: Tensor | None = None,
    variant: Variant = "jakiro",
    activation: Activation = "silu",
) -> Tensor | tuple[Tensor, Tensor]:
    """The draft head's mixture of experts, with its second, contrastive output (Jakiro, arXiv:2502.06282).

    With l = x @ router.T and experts E_i as in `fused_experts`, variant "jakiro" (E = top_k = 2) gives

        y          = residual + a0 E_0 + a1 E_1,           a = softmax(l[0:2])
        y_contrast = residual + s (b0 E_0 - b1 E_1),       b = softmax(l[2:4]), s = +1 if l2 > l3 else -1

    where l2 and l3 are compared after rounding to the dtype of x; ties and NaN give s = -1. Variant "topk" takes any
    E and top_k: a = softmax of the chosen logits of l[0:E] (by the rules of `route`), and the contrast, with b and s
    from l[E:E+2], is between the two best.

    Args:
        x: [T, H]; float32, float16 or bfloat16 (float64 on the CPU).
        router: [E + 2, H] in the dtype of x.
        w_gate: [E, I, H] or None, w_up: [E, I, H], w_down: [E, H, I], as in `fused_experts`.
        w_up: see w_gate.
        w_down: see w_gate.
        top_k: experts of a token.
        contrast: also return y_contrast; it costs no weight bytes.
        residual: [T, H], added to both outputs.
        variant: "jakiro" or "topk".
        activation: of the experts.

    Returns:
        y [T, H], or (y, y_contrast) with `contrast`. Differentiable in all tensors.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or number.
    """
    if variant == "star":
        raise ValueError(
            "tranche.moe_draft: expected variant 'jakiro' or 'topk', got 'star'. Call draft_moe_star."
        )
    codes = (
        _index("moe_draft", "variant", variant, VARIANTS),
        _index("moe_draft", "activation", activation, ACTIVATIONS),
    )
    first, second = _draft(x, router, w_gate, w_up, w_down, top_k, contrast, residual, *codes)
    return (first, second) if contrast else first


def draft_moe_star(x: Tensor, router: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    """Jakiro*'s pair at inference: both experts' outputs, unweighted, that of the larger logit first.

    An expert is w_down @ gelu(w_up @ x); expert 0 is first if l0 > l1, else expert 1. Training takes the weighted
    sum: `fused_experts` with activation "gelu".

    Args:
        x: [T, H]; float32, float16 or bfloat16 (float64 on the CPU).
        router: [2, H].
        w_up: [2, I, H].
        w_down: [2, H, I].

    Returns:
        Two tensors [T, H].

    Raises:
        ValueError: a wrong shape, dtype, device or stride.
    """
    return _draft(
        x, router, None, w_up, w_down, 2, True, None, VARIANTS.index("star"), ACTIVATIONS.index("gelu")
    )


@_library.register_fake("moe_draft")
def _(
    x: Tensor,
    router: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    top_k: int = 2,
    contrast: bool = False,
    residual: Tensor | None = None,
    variant: int = 0,
    activation: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, hidden = x.shape
    outputs = 2 if contrast else 1
    return (
        x.new_empty((tokens, hidden)),
        x.new_empty((tokens if contrast else 0, hidden)),
        x.new_empty((outputs, tokens, top_k), dtype=_weights_dtype(x)),
        x.new_empty((tokens, top_k), dtype=torch.int32),
    )
