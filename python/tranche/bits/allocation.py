"""Which layer deserves how many bits: Hessian traces, quantization errors, and an integer programme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tranche._extras import needed
from tranche.bits.fake_quantize import fake_quantize
from tranche.bits.ops import quantize


def hessian_traces(
    loss: Tensor, weights: Mapping[str, Tensor], *, samples: int = 32, seed: int = 0
) -> dict[str, float]:
    """The trace of the loss's Hessian in each weight, by Hutchinson: the mean of v^T H v over signs v.

    Args:
        loss: a scalar computed from the weights by twice differentiable functions (the model in floating point).
        weights: by name.
        samples: sign vectors.
        seed: of the signs.

    Returns:
        Traces by name. A weight that the loss does not depend on has 0.
    """
    names, tensors = list(weights), list(weights.values())
    gradients = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    traces = dict.fromkeys(names, 0.0)
    for _ in range(samples):
        signs = [
            (2 * torch.randint(2, tuple(t.shape), generator=generator) - 1).to(t.device, t.dtype)
            for t in tensors
        ]
        directional = torch.stack([(g * v).sum() for g, v in zip(gradients, signs, strict=True)]).sum()
        products = torch.autograd.grad(directional, tensors, retain_graph=True, materialize_grads=True)
        for name, product, v in zip(names, products, signs, strict=True):
            traces[name] += float((product * v).sum()) / samples
    return traces


@torch.no_grad()
def weight_errors(
    weights: Mapping[str, Tensor],
    precisions: Sequence[int] = (8, 6, 4, 2),
    *,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[int, float]]:
    """The mean squared error that each precision makes in each weight.

    Times a trace it is twice what the loss should grow by, were the Hessian the same in all directions.

    Args:
        weights: [O, ...] by name.
        precisions: bits.
        scales: [O] by name; absmax / 127 where left out.
    """
    errors: dict[str, dict[int, float]] = {}
    for name, weight in weights.items():
        flat = weight.detach().flatten(1)
        scale = quantize(flat)[1] if scales is None else scales[name].detach()
        errors[name] = {
            bits: float((fake_quantize(flat, scale.to(flat.dtype), bits) - flat).square().mean())
            for bits in precisions
        }
    return errors


def allocate_bits(
    traces: Mapping[str, float],
    errors: Mapping[str, Mapping[int, float]],
    mean_bits: float,
    *,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Bits for each layer that minimise sum_l t_l * err_l(b_l) at a mean of at most `mean_bits`.

    As arXiv 2502.01199 prints its programme, it starves sensitive layers; weighing errors by traces is HAWQ's form
    (arXiv 1911.03852). Solved exactly by scipy.optimize.milp.

    Args:
        traces: t_l, by layer; negative ones count as 0.
        errors: err_l by layer and bits.
        mean_bits: the budget.
        sizes: what a layer weighs in the mean, such as its number of weights; every layer the same when left out.

    Returns:
        Bits by layer.

    Raises:
        ValueError: layers of traces and errors differ, or no assignment is as small as mean_bits.
        ImportError: scipy is not installed.
    """
    import numpy

    with needed("tranche.bits.allocate_bits", "scipy"):
        from scipy.optimize import Bounds, LinearConstraint, milp

    if set(traces) != set(errors):
        raise ValueError(
            f"tranche.bits.allocate_bits: expected errors of the layers of traces {sorted(traces)}, "
            f"got {sorted(errors)}. Name the same layers in both."
        )
    choices = [(name, bits) for name in errors for bits in errors[name]]
    size = {name: 1 if sizes is None else sizes[name] for name in errors}
    least = sum(min(errors[name]) * size[name] for name in errors)
    total = sum(size.values())
    if least > mean_bits * total:
        raise ValueError(
            f"tranche.bits.allocate_bits: expected mean_bits >= {least / total:g}, got {mean_bits:g}. "
            "Allow fewer bits in errors, or raise the budget."
        )
    cost = numpy.array([max(traces[name], 0.0) * errors[name][bits] for name, bits in choices])
    spent = numpy.array([size[name] * bits / total for name, bits in choices])
    one_each = numpy.array([[float(name == layer) for name, _ in choices] for layer in errors])
    found = milp(
        cost / max(cost.max(initial=0.0), 1e-300),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(spent, ub=mean_bits + 1e-9)],
        integrality=numpy.ones(len(choices)),
        bounds=Bounds(0, 1),
    )
    if found.x is None:
        raise RuntimeError(f"tranche.bits.allocate_bits: scipy found no assignment: {found.message}")
    return {name: bits for (name, bits), taken in zip(choices, found.x, strict=True) if taken > 0.5}


__all__ = ["allocate_bits", "hessian_traces", "weight_errors"]
