"""What the family's functions mean, in plain torch; everything is computed in `compute_dtype`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tranche.bits import reference as bits_reference
from tranche.bits.packed import STORED_BITS
from tranche.moe.packed import PackedExperts

LOWEST = -torch.inf


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of that name."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
    return functions[activation](x)


def _finite(logits: Tensor) -> Tensor:
    largest = min(torch.finfo(torch.float32).max, torch.finfo(logits.dtype).max)
    return logits.clamp(-largest, largest).nan_to_num(nan=LOWEST)


def scores_of(logits: Tensor, score: str, rms_weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Scores [T, E] of logits whose NaNs are -inf already."""
    dead = logits == LOWEST
    if score == "softmax":
        shifted = (logits - logits.amax(-1, keepdim=True)).masked_fill(dead, LOWEST)
        raised = shifted.exp()
        total = raised.sum(-1, keepdim=True)
        return torch.where(total > 0, raised / total.clamp(min=1e-300), 0.0)
    if score == "sigmoid":
        return torch.sigmoid(logits)
    rectified = F.relu(logits)
    normed = rectified * torch.rsqrt(rectified.square().mean(-1, keepdim=True) + eps)
    return normed if rms_weight is None else normed * rms_weight.to(logits.dtype)


def choose(ranking: Tensor, top_k: int, groups: int = 1, top_groups: int = 1) -> Tensor:
    """Ids int64 [T, K] of the best entries of `ranking` [T, E], best first, ties to the lower id."""
    tokens, experts = ranking.shape
    if top_groups < groups:
        grouped = ranking.view(tokens, groups, experts // groups)
        best = grouped.topk(min(2, experts // groups), dim=-1).values.sum(-1)
        best = best.nan_to_num(nan=LOWEST, posinf=torch.inf)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
        outside = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
        # below NaN's -inf: such an expert is never chosen, because enough others are inside
        order_key = outside.repeat_interleave(experts // groups, dim=1)
        ranks = ranking.sort(dim=-1, descending=True, stable=True).indices
        position = torch.empty_like(ranks).scatter(
            1, ranks, torch.arange(experts, device=ranks.device).expand_as(ranks)
        )
        return (position + experts * order_key).sort(dim=-1).indices[:, :top_k]
    return ranking.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def route(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    rms_weight: Tensor | None = None,
    eps: float = 1e-6,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Weights [T, K] in compute_dtype, and ids int32 [T, K]."""
    logits = _finite(x.to(compute_dtype) @ weight.to(compute_dtype).T)
    scores = scores_of(logits, score, rms_weight, eps)
    ranking = scores if bias is None else scores + bias.to(compute_dtype)
    ranking = ranking.nan_to_num(nan=LOWEST, posinf=torch.inf, neginf=LOWEST)
    ids = choose(ranking.masked_fill(logits == LOWEST, LOWEST), top_k, groups, top_groups)
    weights = scores.gather(1, ids)
    if renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total != 0, weights / total, 0.0)
    return weights * scale, ids.int()


def expert(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str = "silu"
) -> Tensor:
    """One expert of x [n, H]."""
    up = x @ w_up.T
    hidden = activate(up, activation) if w_gate is None else activate(x @ w_gate.T, activation) * up
    return hidden @ w_down.T


def dense(packed: PackedExperts, bits: int = STORED_BITS, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weights [E, O, I] that packed experts stand for at a precision."""
    step = 2 ** (STORED_BITS - bits)
    experts = range(packed.num_experts)
    codes = torch.stack([bits_reference.unpack(packed.expert(e), bits).to(dtype) for e in experts])
    return codes * step * packed.scale.to(dtype)[..., None]


def _scaled(
    weights: Tensor | PackedExperts | None, scale: Tensor | None, dtype: torch.dtype, bits: int
) -> Tensor | None:
    if weights is None:
        return None
    if isinstance(weights, PackedExperts):
        return dense(weights, bits, dtype)
    return weights.to(dtype) if scale is None else weights.to(dtype) * scale.to(dtype)[..., None]


def fused_experts(
    x: Tensor,
    w_gate: Tensor | PackedExperts | None,
    w_up: Tensor | PackedExperts,
    w_down: Tensor | PackedExperts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    w_gate_scale: Tensor | None = None,
    w_up_scale: Tensor | None = None,
    w_down_scale: Tensor | None = None,
    bits: int = STORED_BITS,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The weighted sum [T, H] of each token's experts. A weight of exactly 0 leaves its expert out."""
    x = x.to(compute_dtype)
    out = torch.zeros_like(x)
    gate = _scaled(w_gate, w_gate_scale, compute_dtype, bits)
    up = _scaled(w_up, w_up_scale, compute_dtype, bits)
    down = _scaled(w_down, w_down_scale, compute_dtype, bits)
    assert up is not None and down is not None
    for e in range(up.shape[0]):
        token, choice = (topk_ids == e).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        yields = expert(x[token], None if gate is None else gate[e], up[e], down[e], activation)
        weight = topk_weights[token, choice].to(compute_dtype)[:, None]
        out = out.index_add(0, token, torch.where(weight == 0, 0.0, weight * yields))
    return out


def draft_coefficients(
    x: Tensor,
    router: Tensor,
    experts: int,
    top_k: int,
    variant: str,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [T, K] of both outputs, and ids int32 [T, K]."""
    logits = x.to(compute_dtype) @ router.to(compute_dtype).T
    if variant == "star":
        first = (logits[:, 0] > logits[:, 1]).to(compute_dtype)
        ids = torch.arange(2, dtype=torch.int32, device=x.device).expand(x.shape[0], 2)
        return torch.stack([first, 1 - first], -1), torch.stack([1 - first, first], -1), ids
    if variant == "jakiro":
        ids = torch.arange(2, dtype=torch.int32, device=x.device).expand(x.shape[0], 2)
        plain = logits[:, :2].softmax(-1)
    else:
        plain, ids = route(x, router[:experts], top_k, compute_dtype=compute_dtype)
    contrast = torch.zeros_like(plain)
    if top_k >= 2:
        pair = logits[:, experts : experts + 2]
        rounded = pair.to(x.dtype)
        sign = torch.where(rounded[:, 0] > rounded[:, 1], 1.0, -1.0).to(compute_dtype)
        b = pair.softmax(-1)
        contrast[:, :2] = sign[:, None] * torch.stack([b[:, 0], -b[:, 1]], -1)
    return plain, contrast, ids


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
    variant: str = "jakiro",
    activation: str = "silu",
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """The draft head's block; with `contrast` also its second output."""
    plain, second, ids = draft_coefficients(x, router, w_up.shape[0], top_k, variant, compute_dtype)
    base = 0.0 if residual is None else residual.to(compute_dtype)

    def output(coefficients: Tensor) -> Tensor:
        arguments = (x, w_gate, w_up, w_down, coefficients, ids)
        return base + fused_experts(*arguments, activation=activation, compute_dtype=compute_dtype)

    return (output(plain), output(second)) if contrast else output(plain)


def draft_moe_star(
    x: Tensor, router: Tensor, w_up: Tensor, w_down: Tensor, *, compute_dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Both experts' outputs, unweighted, the one of the larger logit first."""
    first, second = draft_moe(
        x,
        router,
        None,
        w_up,
        w_down,
        contrast=True,
        variant="star",
        activation="gelu",
        compute_dtype=compute_dtype,
    )
    return first, second


def plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Offsets int32 [E + 1] and slots int32 [T * K]; slots of ids out of range are left out (-1 at the end)."""
    flat = topk_ids.flatten().long()
    valid = (flat >= 0) & (flat < num_experts)
    order = torch.where(valid, flat, num_experts).sort(stable=True).indices
    counts = torch.bincount(flat[valid], minlength=num_experts)
    offsets = F.pad(counts.cumsum(0), (1, 0)).int()
    slots = torch.where(torch.arange(flat.numel(), device=flat.device) < offsets[-1], order, -1)
    return offsets, slots.int()
