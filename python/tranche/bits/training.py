"""Training at several precisions at once: steps of the scales, draws of mixed precisions, and the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tranche.bits.activations import LearnedActivations
from tranche.bits.packed import STORED_BITS
from tranche.bits.qat import QATConv2d, QATLinear
from tranche.bits.switch import at_bits


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The model's learned scales: of weights, and scales and zeros of activations."""
    found: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, QATLinear | QATConv2d):
            found.append(module.scale)
        elif isinstance(module, LearnedActivations):
            found += [module.scale, module.zero]
    return found


class ALRS:
    """The adaptive learning rate of the scales (arXiv 2502.01199), set anew before each step.

    At b bits, with D = h - b and g_i the gradient of the i-th scale tensor, clipped to [-1, 1],

        rate = eta_b * lambda * max(0, 1 - mean_i max |g_i|),   eta_b = 10^(-D/2), or 5 * 10^(-(D+1)/2) for odd D.

    The paper prints eta_b * (lambda - mean_i min(max |g_i|, 1)), which is negative for realistic gradients: a step up
    the slope. `as_printed` computes that.

    Args:
        optimizer: the optimizer of the scales.
        rate: lambda.
        as_printed: the formula of the paper.
        stored_bits: h.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rate: float = 1e-3,
        *,
        as_printed: bool = False,
        stored_bits: int = STORED_BITS,
    ):
        self.optimizer, self.rate = optimizer, rate
        self.as_printed, self.stored_bits = as_printed, stored_bits

    def eta(self, bits: int) -> float:
        """The factor of a precision."""
        delta = self.stored_bits - bits
        return 10.0 ** (-delta // 2) if delta % 2 == 0 else 5 * 10.0 ** (-(delta + 1) // 2)

    def step(self, bits: int) -> float:
        """Set the optimizer's learning rate from the gradients that its parameters have now, and return it."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        largest = [float(p.grad.abs().amax().clamp(max=1)) for p in parameters if p.grad is not None]
        mean = sum(largest) / max(len(largest), 1)
        bracket = self.rate - mean if self.as_printed else self.rate * max(0.0, 1 - mean)
        rate = self.eta(bits) * bracket
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate


class HASBSampler:
    """Draws bits for each layer by its sensitivity (HASB of arXiv 2502.01199).

    Layers whose Hessian trace is below the mean draw a precision uniformly; the others draw b_i with probability
    b_i / sum(b), so that sensitive layers get more bits. A draw happens with probability sigma, which grows with
    progress; otherwise there is none and the model trains at one precision.

    Args:
        traces: Hessian trace of each layer, by name.
        precisions: what to draw from.
        sigma: probability of a draw at a progress in [0, 1].
        seed: of the draws.
    """

    def __init__(
        self,
        traces: Mapping[str, float],
        precisions: Sequence[int] = (8, 6, 4, 2),
        *,
        sigma: Callable[[float], float] = lambda progress: progress,
        seed: int = 0,
    ):
        self.traces, self.precisions, self.sigma = dict(traces), tuple(precisions), sigma
        self.mean = sum(self.traces.values()) / max(len(self.traces), 1)
        self.generator = torch.Generator().manual_seed(seed)

    def probabilities(self, name: str) -> Tensor:
        """How likely a layer is to draw each precision."""
        weights = torch.tensor(self.precisions, dtype=torch.float64)
        if self.traces[name] < self.mean:
            weights = torch.ones_like(weights)
        return weights / weights.sum()

    def sample(self, progress: float) -> dict[str, int] | None:
        """Bits by layer, or None."""
        if float(torch.rand((), generator=self.generator)) >= self.sigma(progress):
            return None
        return {
            name: self.precisions[
                int(torch.multinomial(self.probabilities(name), 1, generator=self.generator))
            ]
            for name in self.traces
        }


class JointTrainer:
    """Trains one weight for every precision: for each batch, at each precision, one step.

    Args:
        model: after `prepare_qat`.
        loss: (model, batch) to a scalar.
        optimizer: of the weights (everything but the scales).
        scale_optimizer: of the scales, or None to leave them as they are.
        precisions: trained in this order.
        alrs: sets the learning rate of the scales before each of their steps; None leaves it alone.
        sampler: adds a step at mixed precisions when it draws some.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        optimizer: torch.optim.Optimizer,
        scale_optimizer: torch.optim.Optimizer | None = None,
        *,
        precisions: Sequence[int] = (8, 6, 4, 2),
        alrs: ALRS | None = None,
        sampler: HASBSampler | None = None,
    ):
        self.model, self.loss = model, loss
        self.optimizer, self.scale_optimizer = optimizer, scale_optimizer
        self.precisions, self.alrs, self.sampler = tuple(precisions), alrs, sampler
        self.batches = 0

    def _step(self, batch: Any, bits: int | Mapping[str, int], rate_bits: int) -> float:
        self.optimizer.zero_grad()
        if self.scale_optimizer is not None:
            self.scale_optimizer.zero_grad()
        with at_bits(self.model, bits):
            loss = self.loss(self.model, batch)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"tranche.bits.JointTrainer: the loss became {loss.item()} at {bits} bits, in batch "
                    f"{self.batches}. Nothing was updated; lower a learning rate and resume from a checkpoint."
                )
            loss.backward()
        self.optimizer.step()
        if self.scale_optimizer is not None:
            if self.alrs is not None:
                self.alrs.step(rate_bits)
            self.scale_optimizer.step()
        return float(loss.detach())

    def step(self, batch: Any, progress: float = 0.0) -> dict[int, float]:
        """One batch at every precision.

        Args:
            batch: what `loss` takes.
            progress: of the training, in [0, 1], for the sampler.

        Returns:
            The loss at each precision.

        Raises:
            FloatingPointError: a loss that is NaN or infinite, before anything is updated from it.
        """
        losses = {bits: self._step(batch, bits, bits) for bits in self.precisions}
        mixed = self.sampler.sample(progress) if self.sampler is not None else None
        if mixed is not None:
            self._step(batch, mixed, min(mixed.values()))
        self.batches += 1
        return losses

    def epoch(self, batches: Iterable[Any], progress: float = 0.0) -> dict[int, float]:
        """`step` for each batch; the mean losses."""
        totals = dict.fromkeys(self.precisions, 0.0)
        count = 0
        for batch in batches:
            for bits, loss in self.step(batch, progress).items():
                totals[bits] += loss
            count += 1
        return {bits: total / max(count, 1) for bits, total in totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on as if it had not stopped."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scale_optimizer": self.scale_optimizer and self.scale_optimizer.state_dict(),
            "sampler": self.sampler and self.sampler.generator.get_state(),
            "batches": self.batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scale_optimizer is not None:
            self.scale_optimizer.load_state_dict(state["scale_optimizer"])
        if self.sampler is not None:
            self.sampler.generator.set_state(state["sampler"])
        self.batches = state["batches"]


__all__ = ["ALRS", "HASBSampler", "JointTrainer", "scale_parameters"]
