"""A PartialNet-tiny and a search of ratios on scikit-learn's handwritten digits: real images that need no download."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from tranche._extras import needed
from tranche.pconv.dynamic import DPConv, freeze, order_loss, resource_at, resource_penalty
from tranche.pconv.fold import fold
from tranche.pconv.partialnet import PartialNet

BATCH = 64
# The published -0.01 is for hundreds of epochs of a million images; here a few hundred steps have to show its effect.
SEARCH_EXPONENT = -0.5


@dataclass
class Digits:
    """Images [N, 1, 8, 8] of mean 0 and deviation 1, and labels [N]."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass
class Run:
    """One training: the accuracy on the test images after each epoch."""

    name: str
    accuracies: list[float] = field(default_factory=list)
    ratios: dict[str, int] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """After the last epoch."""
        return self.accuracies[-1]


@dataclass
class Outcome:
    """What `train` found."""

    runs: list[Run]
    model: PartialNet
    fold_error: float
    digits: Digits


def partialnet_tiny(**kw: Any) -> PartialNet:
    """Three stages of one, two and one blocks for images of 8 x 8 pixels."""
    given: dict[str, Any] = {
        "num_classes": 10,
        "embed_dim": 16,
        "depths": (1, 2, 1),
        "patch_size": 1,
        "feature_dim": 128,
    }
    model = PartialNet(1, **(given | kw))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):  # layers as narrow as these start too small at 0.02
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


def load_digits(device: str, seed: int) -> Digits:
    """The 1797 digits, a quarter of them for testing."""
    with needed("tranche.pconv train-demo", "sklearn"):
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    images, labels = load(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    pixels = (pixels - pixels.mean()) / pixels.std()
    first, second = train_test_split(range(len(labels)), test_size=0.25, random_state=seed, stratify=labels)
    classes = torch.tensor(labels)
    return Digits(
        (pixels[first].to(device), classes[first].to(device)),
        (pixels[second].to(device), classes[second].to(device)),
    )


def _batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(labels), device=labels.device)
    for chosen in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
        yield images[chosen], labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the model classifies rightly, in evaluation; DPConv modules with all their groups."""
    for module in model.eval().modules():
        if isinstance(module, DPConv):
            module.train()
    return float((model(images).argmax(1) == labels).float().mean())


def fit(
    model: PartialNet, digits: Digits, epochs: int, run: Run, tick: Any, target: float | None = None
) -> None:
    """Train by AdamW under a one-cycle schedule; with `target`, search for ratios of that resource."""
    gates = [p for name, p in model.named_parameters() if name.endswith("gate")]
    others = [p for name, p in model.named_parameters() if not name.endswith("gate")]
    groups: list[dict[str, Any]] = [{"params": others}]
    if gates:
        groups.append({"params": gates, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=4e-3, weight_decay=0.05)
    steps = epochs * (len(digits.train[1]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        model.train()
        for images, labels in _batches(*digits.train):
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            if target is not None:
                loss = loss * resource_penalty(model, target, SEARCH_EXPONENT) + order_loss(model)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        run.accuracies.append(accuracy(model, *digits.test))
        tick(run)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=total)

        def tick(run: Run) -> None:
            progress.update(task, advance=1, description=f"{run.name}: {run.accuracy:.2%} of the test digits")

        yield tick


def train(epochs: int = 25, seed: int = 0, device: str = "cpu") -> Outcome:
    """Train a PartialNet-tiny; search DPConv ratios and train a network with them; fold the first network.

    Returns:
        Accuracies, the ratios found, and the largest difference between the folded network and the network.
    """
    torch.manual_seed(seed)
    digits = load_digits(device, seed)
    static, searched, retrained = Run("PartialNet-tiny"), Run("DPConv search"), Run("those ratios, trained")
    with _progress(3 * epochs) as tick:
        model = partialnet_tiny(device=device)
        fit(model, digits, epochs, static, tick)
        search = partialnet_tiny(search=True, device=device)
        fit(search, digits, epochs, searched, tick, target=resource_at(search, 4))
        searched.ratios = freeze(search)
        retrained.ratios = searched.ratios
        again = partialnet_tiny(n_div=list(searched.ratios.values()), attention=False, device=device)
        fit(again, digits, epochs, retrained, tick)
    model.eval()
    with torch.no_grad():
        difference = (fold(model)(digits.test[0]) - model(digits.test[0])).abs().max()
    return Outcome([static, searched, retrained], model, float(difference), digits)


def show(outcome: Outcome, console: Console) -> None:
    """The table a person reads."""
    table = Table(
        "network",
        "test accuracy",
        "n_div of each block",
        title="Digits of 8 x 8 pixels",
        title_justify="left",
    )
    for run in outcome.runs:
        ratios = ", ".join(map(str, run.ratios.values())) or "4, 4, 4, 4"
        table.add_row(run.name, f"{run.accuracy:.2%}", ratios)
    console.print(table)
    console.print(f"Folded for inference, PartialNet-tiny differs by {outcome.fold_error:.1e} at most.")


def plot(outcome: Outcome, path: Path) -> None:
    """Learning curves, the ratios found, and what the network says of some test images."""
    with needed("tranche.pconv train-demo --plot", "matplotlib"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(11, 6), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(2, 1))
    above, below = halves
    curves, bars = above.subplots(1, 2)
    for run in outcome.runs:
        curves.plot(range(1, len(run.accuracies) + 1), [100 * a for a in run.accuracies], label=run.name)
    curves.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(90, 100.5), title="Digits of 8 x 8 pixels")
    curves.axhline(98, color="grey", linewidth=0.8, linestyle=":")
    curves.legend()
    ratios = outcome.runs[-1].ratios
    names = [name.removeprefix("stages.").removesuffix(".spatial_mixing") for name in ratios]
    bars.bar(names, [100 / n_div for n_div in ratios.values()])
    bars.set(xlabel="block", ylabel="channels convolved, %", title="Ratios found by DPConv")
    images, labels = outcome.digits.test
    with torch.no_grad():
        guesses = outcome.model.eval()(images[:12]).argmax(1)
    for axes, image, guess, label in zip(below.subplots(1, 12), images, guesses, labels, strict=False):
        axes.imshow(image[0].cpu(), cmap="gray_r")
        axes.set_axis_off()
        axes.set_title(str(int(guess)), color="black" if guess == label else "red")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
