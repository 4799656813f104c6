"""Training a draft head on a target's own features: Jakiro's loss (arXiv 2502.06282), AdamW, checkpoints, resume."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from tranche.decode import target
from tranche.decode.head import JakiroHead


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """The parts of the loss, each a scalar, and their weighted sum.

    Attributes:
        feature: V1, the first output's SmoothL1 distance from the target's next feature.
        token: P1, its cross-entropy against the target's distribution.
        feature_contrast: V2, as V1 of the second output and the feature one step further; 0 from a plain head.
        token_contrast: P2, likewise.
        total: (V1 + 0.5 V2) + 0.1 (P1 + 0.5 P2), by the default weights.
    """

    feature: Tensor
    token: Tensor
    feature_contrast: Tensor
    token_contrast: Tensor
    total: Tensor


def head_loss(
    first: Tensor,
    second: Tensor | None,
    features: Tensor,
    output_weight: Tensor,
    *,
    mask: Tensor | None = None,
    token_weight: float = 0.1,
    contrast_weight: float = 0.5,
) -> HeadLoss:
    """The loss of a head's outputs over a text (Jakiro, arXiv 2502.06282, section 3.4).

        V = mean SmoothL1(f', f),    P = -mean sum_v softmax(W f)_v log softmax(W f')_v
        L = (V1 + c V2) + p (P1 + c P2)

    where f' at t is compared with the target's feature at t + 1 for the first output, at t + 2 for the second.

    Args:
        first: [B, T, H], the head's first output from positions 0 to T - 1.
        second: [B, T, H], its second, or None.
        features: [B, T + 1, H], the target's features at positions 0 to T.
        output_weight: [V, H], the target's output embeddings.
        mask: bool [B, T + 1], the positions whose features count as a goal; all when left out.
        token_weight: p.
        contrast_weight: c.
    """

    def compare(predicted: Tensor, shift: int) -> tuple[Tensor, Tensor]:
        goal = features[:, shift:].float()
        predicted = predicted[:, : goal.size(1)].float()
        counted = torch.ones_like(goal[..., 0]) if mask is None else mask[:, shift:].float()
        count = counted.sum().clamp(min=1)
        distance = F.smooth_l1_loss(predicted, goal, reduction="none").mean(-1)
        wanted = F.linear(goal, output_weight).softmax(-1)
        surprise = -(wanted * F.linear(predicted, output_weight).log_softmax(-1)).sum(-1)
        return (distance * counted).sum() / count, (surprise * counted).sum() / count

    v1, p1 = compare(first, 1)
    v2, p2 = (torch.zeros_like(v1), torch.zeros_like(p1)) if second is None else compare(second, 2)
    total = (v1 + contrast_weight * v2) + token_weight * (p1 + contrast_weight * p2)
    return HeadLoss(v1, p1, v2, p2, total)


@dataclasses.dataclass(frozen=True)
class HeadRecipe:
    """How a head is trained. The defaults are the published ones, made for long training of a large head.

    Attributes:
        steps: of the optimizer.
        batch: windows of a step.
        length: tokens of a window.
        learning_rate: AdamW's peak: reached in a twentieth of the steps, lowered to a tenth by a cosine.
        weight_decay: AdamW's.
        clip: gradients are clipped to this value, number by number.
        noise: half-width of the uniform noise on the features that the head reads, which at drafting are its own.
        token_weight: p of `head_loss`.
        contrast_weight: c of `head_loss`.
        precision: of the passes; weights and losses are fp32.
        seed: of windows and noise.
    """

    steps: int = 2000
    batch: int = 8
    length: int = 512
    learning_rate: float = 9e-5
    weight_decay: float = 1e-3
    clip: float = 0.5
    noise: float = 0.05
    token_weight: float = 0.1
    contrast_weight: float = 0.5
    precision: torch.dtype = torch.bfloat16
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        warm_up = max(1, self.steps // 20)
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min((step + 1) / warm_up, cosine)


def train_head(
    model: PreTrainedModel,
    head: JakiroHead | None,
    text: Tensor,
    recipe: HeadRecipe | None = None,
    *,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> JakiroHead:
    """Train a head for a target on a text; the target is not changed.

    Every step draws windows of the text, has the target make their features, and moves the head by `head_loss`.
    What a step draws is a function of (seed, step) alone, so that a run that was interrupted and goes on from its
    checkpoint ends with the weights of one that was not.

    Args:
        model: the target, whose embeddings and output embeddings the head works with.
        head: what to train, in place; None makes one, of the recipe's seed.
        text: tokens of the target, integers [n], n > length: the user's own text.
        recipe: how; default the published settings.
        checkpoint: a file for the state of the training. If it is there, training goes on from it.
        checkpoint_every: steps between two of them.
        progress: show a progress bar.

    Returns:
        The head, in eval mode.

    Raises:
        ValueError: a text that is too short or has tokens outside the vocabulary, a head of another size, a
            checkpoint of another recipe.
        FloatingPointError: the loss is not finite.
    """
    recipe = recipe or HeadRecipe()
    head = JakiroHead.for_model(model, seed=recipe.seed) if head is None else head
    head.check_fits(model)
    _check_text(text, recipe, target.vocabulary(model))
    trained = {name: p for name, p in head.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    file = None if checkpoint is None else Path(checkpoint)
    done = _resume(file, head, optimizer, recipe) if file is not None and file.exists() else 0
    output_weight = _output_weight(model)
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    head.train()
    columns = (TextColumn("training a draft head"), BarColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
            task = bar.add_task("", total=recipe.steps, completed=done)
            for step in range(done, recipe.steps):
                loss = _step(model, head, trained, optimizer, text, recipe, step, output_weight)
                if file is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps):
                    _save(file, head, optimizer, recipe, step + 1)
                if progress:
                    bar.update(task, advance=1, description=f"loss {loss.total.item():.3f}")
    finally:
        for module in was_training:
            module.training = True
        head.eval()
    return head


def _step(
    model: PreTrainedModel,
    head: JakiroHead,
    trained: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    text: Tensor,
    recipe: HeadRecipe,
    step: int,
    output_weight: Tensor,
) -> HeadLoss:
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    start = torch.randint(len(text) - recipe.length, (recipe.batch, 1), generator=generator)
    device = output_weight.device
    window = text[start + torch.arange(recipe.length + 1)].to(device, torch.int64)
    with torch.no_grad(), torch.autocast(device.type, recipe.precision, enabled=_is_low(recipe.precision)):
        features = model.get_decoder()(input_ids=window, use_cache=False).last_hidden_state.float()
    read = features[:, :-1]
    if recipe.noise:
        noise = torch.rand(read.shape, generator=generator).to(device)
        read = read + recipe.noise * (2 * noise - 1)
    # the weights stay fp32: a step may be smaller than what their rounding to 16 bits would keep
    cast = {name: p.to(recipe.precision) for name, p in trained.items()}
    first, second = torch.func.functional_call(head, cast, (window[:, 1:], read))
    loss = head_loss(
        first,
        second,
        features,
        output_weight,
        token_weight=recipe.token_weight,
        contrast_weight=recipe.contrast_weight,
    )
    if not torch.isfinite(loss.total):
        parts = {field.name: getattr(loss, field.name).item() for field in dataclasses.fields(loss)}
        raise FloatingPointError(
            f"tranche.train_head: expected a finite loss, got {parts} at step {step}. Lower the recipe's learning rate "
            "or, where the target's features are not finite, its precision."
        )
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate(step)
    optimizer.zero_grad()
    loss.total.backward()
    torch.nn.utils.clip_grad_value_(trained.values(), recipe.clip)
    optimizer.step()
    return loss


def _is_low(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


@torch.no_grad()
def _output_weight(model: PreTrainedModel) -> Tensor:
    """The target's output embeddings [V, H], fp32, whatever kind of linear module they are."""
    module = model.get_output_embeddings()
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.detach().float()
    hidden = model.config.get_text_config().hidden_size
    unit = torch.eye(hidden, dtype=model.dtype, device=model.device)
    return module(unit).float().T.contiguous()


def _check_text(text: Tensor, recipe: HeadRecipe, vocabulary: int) -> None:
    if text.dim() != 1 or text.is_floating_point() or len(text) <= recipe.length:
        raise ValueError(
            f"tranche.train_head: expected text to be more than length ({recipe.length}) integers [n], got "
            f"{text.dtype} {list(text.shape)}. Give the tokens of a longer text, or a smaller length."
        )
    if int(text.min()) < 0 or int(text.max()) >= vocabulary:
        raise ValueError(
            f"tranche.train_head: expected tokens in [0, {vocabulary}), got [{int(text.min())}, {int(text.max())}]. "
            "Use the target's tokenizer."
        )


def _save(
    file: Path, head: JakiroHead, optimizer: torch.optim.Optimizer, recipe: HeadRecipe, step: int
) -> None:
    state: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe),
        "step": step,
        "head": {name: value for name, value in head.state_dict().items() if name != "embed_tokens.weight"},
        "optimizer": optimizer.state_dict(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    torch.save(state, partial)
    partial.replace(file)  # whole, or as it was


def _resume(file: Path, head: JakiroHead, optimizer: torch.optim.Optimizer, recipe: HeadRecipe) -> int:
    state = torch.load(file, map_location=head.fc.weight.device, weights_only=True)
    ours = dataclasses.asdict(recipe)
    other = {name: state["recipe"].get(name) for name in ours if state["recipe"].get(name) != ours[name]}
    if other:
        wanted = {name: ours[name] for name in other}
        raise ValueError(
            f"tranche.train_head: expected a checkpoint of this recipe ({wanted}), got one of {other} in {file}. "
            "Train with that recipe, or into another checkpoint."
        )
    head.load_state_dict(state["head"] | {"embed_tokens.weight": head.embed_tokens.weight})
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
