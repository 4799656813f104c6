"""Backward of the family. Expert outputs are not kept: <g, E_i> = <g W_down_i, h_i>, and h_i is computed again.

The matrix products are torch's: training is bound by arithmetic, not by the bytes of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tranche import _library

SOFTMAX, SIGMOID, RELU_RMS = 0, 1, 2
JAKIRO, STAR = 0, 2
HALF_SQRT = 0.7071067811865476
NORMAL = 0.3989422804014327  # 1 / sqrt(2 pi)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What elementwise arithmetic is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _activate(code: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    if code == 0:
        s = torch.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if code == 1:
        half = 0.5 * torch.special.erfc(-x * HALF_SQRT)
        return x * half, half + x * NORMAL * torch.exp(-0.5 * x * x)
    return F.relu(x), (x > 0).to(x.dtype)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.mT @ b


def _expert_backward(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    grads: list[Tensor],
    weights: Tensor,
    code: int,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    outer: Callable[[Tensor, Tensor], Tensor] = _outer,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """One expert, a stack of them by leading dimensions, or groups of rows with an expert each.

    Args:
        x: [n, H], gate and up [..., I, H], down [..., H, I], grads P times [n, H], weights [P, ..., n].
        gate: see x.
        up: see x.
        down: see x.
        grads: see x.
        weights: see x.
        code: the activation.
        product: rows times the matrices.
        outer: the sum over rows of outer products.

    Returns:
        gradients of x (before the sum over the stack), weights, gate, up and down.
    """
    dtype, wide = x.dtype, _wide(x.dtype)
    raised = product(x, up.mT).to(wide)
    if gate is None:
        h, slope = _activate(code, raised)
        gated = acted = None
    else:
        gated = product(x, gate.mT).to(wide)
        acted, slope = _activate(code, gated)
        h = acted * raised
    through = [product(g, down).to(wide) for g in grads]
    grad_weights = torch.stack([(q * h).sum(-1) for q in through])
    grad_h = sum(w[..., None] * q for w, q in zip(weights, through, strict=True))
    grad_yields = sum(w[..., None] * g.to(wide) for w, g in zip(weights, grads, strict=True)).to(dtype)
    grad_down = outer(grad_yields, h.to(dtype))
    grad_raised = (grad_h * (slope if acted is None else acted)).to(dtype)
    grad_x = product(grad_raised, up)
    grad_up = outer(grad_raised, x)
    grad_gate = None
    if gate is not None:
        grad_gated = (grad_h * raised * slope).to(dtype)
        grad_x = grad_x + product(grad_gated, gate)
        grad_gate = outer(grad_gated, x)
    return grad_x, grad_weights, grad_gate, grad_up, grad_down


def _can_group(x: Tensor, w_up: Tensor, top_k: int) -> bool:
    """Whether torch's grouped matmul takes these: bf16, whole 16 bytes; and whether there is anything to save."""
    aligned = all(size % 8 == 0 for size in w_up.shape[1:])
    return x.dtype == torch.bfloat16 and aligned and top_k < w_up.shape[0]


def _grouped_backward(
    grads: list[Tensor],
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    coefficients: Tensor,
    chosen: Tensor,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Only the chosen experts, their slots sorted by expert; the counts stay on the device.

    `chosen` [T * K] are expert numbers, w_up.shape[0] where there is none.
    """
    experts, (outputs, tokens, top_k) = w_up.shape[0], coefficients.shape
    order = chosen.sort(stable=True).indices
    counts = torch.zeros(experts + 1, dtype=torch.int32, device=x.device)
    counts = counts.scatter_add(0, chosen, torch.ones_like(chosen, dtype=torch.int32))[:experts]
    ends = counts.cumsum(0, dtype=torch.int32)
    token = order // top_k

    def product(rows: Tensor, matrices: Tensor) -> Tensor:
        return torch._grouped_mm(rows, matrices, offs=ends)

    def outer(a: Tensor, b: Tensor) -> Tensor:
        sums = torch._grouped_mm(a.mT, b, offs=ends)
        return torch.where((counts > 0)[:, None, None], sums, 0)  # a sum of nothing may be anything

    of_rows, of_weights, grad_gate, grad_up, grad_down = _expert_backward(
        x[token].contiguous(),
        w_gate,
        w_up,
        w_down,
        [g[token].contiguous() for g in grads],
        coefficients.reshape(outputs, -1)[:, order],
        activation,
        product,
        outer,
    )
    served = chosen[order] < experts  # rows of no group may be anything
    of_rows = torch.where(served[:, None], of_rows, 0)
    of_weights = torch.where(served, of_weights, 0)
    # back to slots, where a token's choices are added in their order
    grad_x = torch.empty_like(of_rows).index_copy_(0, order, of_rows).view(tokens, top_k, -1)
    grad_coefficients = torch.empty_like(of_weights).index_copy_(1, order, of_weights)
    return (
        grad_x.sum(1, dtype=_wide(x.dtype)).to(x.dtype),
        grad_coefficients.view(outputs, tokens, top_k).to(coefficients.dtype),
        grad_gate,
        grad_up,
        grad_down,
    )


# A Python op of its own, so that tracers see one node and not the loop over experts.
@torch.library.custom_op("tranche_moe::experts_backward", mutates_args=())
def experts_backward(
    grads: list[Tensor],
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    coefficients: Tensor,
    ids: Tensor,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_gate (empty without one), w_up, w_down and coefficients [P, T, K]."""
    tokens, experts = x.shape[0], w_up.shape[0]
    outputs, _, top_k = coefficients.shape
    valid = (ids >= 0) & (ids < experts)  # forward left the others out
    if x.is_cuda and _can_group(x, w_up, top_k):
        chosen = torch.where(valid, ids, experts).flatten().long()
        of_x, of_coefficients, of_gate, of_up, of_down = _grouped_backward(
            grads, x, w_gate, w_up, w_down, coefficients, chosen, activation
        )
        return of_x, x.new_empty(0) if of_gate is None else of_gate, of_up, of_down, of_coefficients
    if x.is_cuda:
        # without a look at the counts: every expert for every token, most with weight 0
        index = torch.where(valid, ids, 0).long()[None].expand(outputs, -1, -1)
        dense = coefficients.new_zeros(outputs, tokens, experts).scatter_add(2, index, coefficients * valid)
        by_expert, grad_dense, grad_gate, grad_up, grad_down = _expert_backward(
            x, w_gate, w_up, w_down, grads, dense.transpose(1, 2), activation
        )
        grad_coefficients = grad_dense.transpose(1, 2).gather(2, index).to(coefficients.dtype) * valid
        none = x.new_empty(0)
        return (
            by_expert.sum(0),
            none if grad_gate is None else grad_gate,
            grad_up,
            grad_down,
            grad_coefficients,
        )
    grad_x = torch.zeros(x.shape, dtype=_wide(x.dtype), device=x.device)
    grad_gate = x.new_empty(0) if w_gate is None else x.new_zeros(w_gate.shape)
    grad_up, grad_down = x.new_zeros(w_up.shape), x.new_zeros(w_down.shape)
    grad_coefficients = coefficients.new_zeros(coefficients.shape)
    flat, flat_grad = coefficients.reshape(outputs, -1), grad_coefficients.view(outputs, -1)
    chosen = torch.where(valid, ids, experts).flatten()
    order = chosen.sort(stable=True).indices
    counts = torch.bincount(chosen, minlength=experts + 1).tolist()
    for e, slots in enumerate(order.split(counts)):
        if slots.numel() == 0 or e == experts:
            continue
        token = slots // top_k
        gate = None if w_gate is None else w_gate[e]
        of_x, of_weights, of_gate, of_up, of_down = _expert_backward(
            x[token], gate, w_up[e], w_down[e], [g[token] for g in grads], flat[:, slots], activation
        )
        grad_x.index_add_(0, token, of_x.to(grad_x.dtype))
        flat_grad[:, slots] = of_weights.to(flat_grad.dtype)
        grad_up[e], grad_down[e] = of_up, of_down
        if of_gate is not None:
            grad_gate[e] = of_gate
    return grad_x.to(x.dtype), grad_gate, grad_up, grad_down, grad_coefficients


@experts_backward.register_fake
def _(
    grads: list[Tensor],
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    coefficients: Tensor,
    ids: Tensor,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate = x.new_empty(0) if w_gate is None else x.new_empty(w_gate.shape)
    return (
        x.new_empty(x.shape),
        gate,
        x.new_empty(w_up.shape),
        x.new_empty(w_down.shape),
        coefficients.new_empty(coefficients.shape),
    )


class Experts(torch.autograd.Function):
    """`fused_experts` with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_gate: Tensor | None,
        w_up: Tensor,
        w_down: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: int,
        offsets: Tensor | None,
        slots: Tensor | None,
    ) -> Tensor:
        """The op."""
        ctx.save_for_backward(x, w_gate, w_up, w_down, topk_weights, topk_ids)
        ctx.activation = activation
        return _library.ops().moe_experts(
            x, w_gate, w_up, w_down, topk_weights, topk_ids, activation, None, None, None, offsets, slots
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients in the order of forward's arguments."""
        x, w_gate, w_up, w_down, weights, ids = ctx.saved_tensors
        of_x, of_gate, of_up, of_down, of_weights = experts_backward(
            [grad], x, w_gate, w_up, w_down, weights[None], ids, ctx.activation
        )
        none = (None, None, None, None)
        return (of_x, None if w_gate is None else of_gate, of_up, of_down, of_weights[0], *none)


def _softmax_backward(probabilities: Tensor, grad: Tensor) -> Tensor:
    return probabilities * (grad - (probabilities * grad).sum(-1, keepdim=True))


class Draft(torch.autograd.Function):
    """`draft_moe` with gradients; its coefficients are kept, so that the sign of the contrast is forward's own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        router: Tensor,
        w_gate: Tensor | None,
        w_up: Tensor,
        w_down: Tensor,
        residual: Tensor | None,
        options: tuple[int, bool, int, int],
    ) -> tuple[Tensor, Tensor]:
        """The op; `options` are top_k, contrast, variant, activation."""
        top_k, contrast, variant, activation = options
        first, second, coefficients, ids = _library.ops().moe_draft(
            x, router, w_gate, w_up, w_down, top_k, contrast, residual, variant, activation
        )
        ctx.save_for_backward(x, router, w_gate, w_up, w_down, coefficients, ids)
        ctx.options, ctx.has_residual = options, residual is not None
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_contrast: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients in the order of forward's arguments."""
        x, router, w_gate, w_up, w_down, coefficients, ids = ctx.saved_tensors
        _, contrast, variant, activation = ctx.options
        grads = [grad, grad_contrast] if contrast else [grad]
        of_x, of_gate, of_up, of_down, of_coefficients = experts_backward(
            grads, x, w_gate, w_up, w_down, coefficients, ids, activation
        )
        of_router = torch.zeros_like(router)
        if variant != STAR:
            of_logits = _draft_logits_backward(coefficients, of_coefficients, ids, router.shape[0] - 2).to(
                x.dtype
            )
            of_x = of_x + of_logits @ router
            of_router = of_logits.mT @ x
        of_residual = sum(grads) if ctx.has_residual else None
        return (of_x, of_router, None if w_gate is None else of_gate, of_up, of_down, of_residual, None)


def _draft_logits_backward(coefficients: Tensor, grads: Tensor, ids: Tensor, experts: int) -> Tensor:
    of_logits = coefficients.new_zeros(ids.shape[0], experts + 2)
    of_logits.scatter_(1, ids.long(), _softmax_backward(coefficients[0], grads[0]))
    if coefficients.shape[0] > 1:
        pair, of_pair = coefficients[1, :, :2], grads[1, :, :2]
        # s (b0, -b1): its difference has the sign s
        sign = torch.where(pair[:, :1] > pair[:, 1:], 1.0, -1.0).to(pair.dtype)
        of_b = of_pair * torch.cat([sign, -sign], 1)
        of_logits[:, experts:] = _softmax_backward(pair.abs(), of_b)
    return of_logits


class Route(torch.autograd.Function):
    """`route` with gradients of the weights; ids have none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rms_weight: Tensor | None, options: tuple[Any, ...], eps: float
    ) -> tuple[Tensor, Tensor]:
        """The op."""
        weights, ids = _library.ops().moe_route(x, weight, *options, rms_weight, eps)
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(x, weight, rms_weight, ids)
        ctx.score, ctx.renormalize, ctx.scale, ctx.eps = options[1], options[2], options[6], eps
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients in the order of forward's arguments."""
        x, weight, rms_weight, ids = ctx.saved_tensors
        wide, index = _wide(x.dtype), ids.long()
        logits = (x @ weight.mT).to(wide)
        dead = logits.isnan()
        logits = logits.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
        logits = logits.masked_fill(dead, -torch.inf)
        if ctx.score == SOFTMAX:
            scores = torch.softmax(logits, -1).nan_to_num(nan=0.0)
        elif ctx.score == SIGMOID:
            scores = torch.sigmoid(logits)
        else:
            rectified = F.relu(logits)
            inverse = torch.rsqrt(rectified.square().mean(-1, keepdim=True) + ctx.eps)
            gain = torch.ones_like(logits[0]) if rms_weight is None else rms_weight.to(wide)
            scores = rectified * inverse * gain
        grad = grad * ctx.scale
        if ctx.renormalize:
            chosen = scores.gather(1, index)
            total = chosen.sum(-1, keepdim=True)
            usable = total != 0
            safe = torch.where(usable, total, 1.0)
            grad = torch.where(usable, (grad - (grad * chosen / safe).sum(-1, keepdim=True)) / safe, 0.0)
        of_scores = torch.zeros_like(scores).scatter(1, index, grad.to(wide))
        of_rms = None
        if ctx.score == SOFTMAX:
            of_logits = _softmax_backward(scores, of_scores)
        elif ctx.score == SIGMOID:
            of_logits = of_scores * scores * (1 - scores)
        else:
            if rms_weight is not None:
                of_rms = (of_scores * rectified * inverse).sum(0).to(rms_weight.dtype)
            of_normed = of_scores * gain
            mean = (of_normed * rectified).mean(-1, keepdim=True)
            of_logits = (of_normed * inverse - rectified * inverse**3 * mean) * (logits > 0)
        of_logits = of_logits.masked_fill(dead, 0.0).to(x.dtype)
        return of_logits @ weight, of_logits.mT @ x, of_rms, None, None
