"""The training demo: one small network for 8, 6, 4 and 2 bits at once, on scikit-learn's digits."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from tranche._extras import needed
from tranche.bits.allocation import allocate_bits, hessian_traces, weight_errors
from tranche.bits.qat import Activations, calibrate, prepare_qat
from tranche.bits.switch import at_bits
from tranche.bits.training import ALRS, HASBSampler, JointTrainer, scale_parameters

PRECISIONS = (8, 6, 4, 2)
MIXED_PRECISIONS = (8, 6, 4, 3, 2)  # a layer's choices where layers differ
BLOCKS = ("middle", "late", "dense")  # what is quantized: all but the first and the last layer
METHODS = ("joint", "ALRS off", "separate")
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """How the demo trains."""

    seeds: int = 5
    float_epochs: int = 15
    epochs: int = 6
    batch: int = 96
    learning_rate: float = 2e-3
    scale_rate: float = 1e-3
    activations: str = "learned"  # or "8", or "none"
    mean_bits: int = 3


def digits() -> tuple[Data, Data]:
    """The 1797 images of 8 x 8 as [N, 1, 8, 8] in [0, 1], three quarters to train on: the same split on every run."""
    with needed("tranche.bits train-demo", "sklearn"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = (torch.tensor(part) for part in split)
    return (
        (x_train.float().view(-1, 1, 8, 8) / 16, y_train),
        (x_test.float().view(-1, 1, 8, 8) / 16, y_test),
    )


def network() -> nn.Module:
    """Three convolutions and two dense layers, 40 thousand weights."""

    def block(layer: nn.Module, norm: nn.Module, *more: nn.Module) -> nn.Sequential:
        return nn.Sequential(layer, norm, nn.ReLU(), *more)

    model = nn.Sequential()
    model.add_module("early", block(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)))
    pool = nn.MaxPool2d(2)
    model.add_module("middle", block(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), pool))
    model.add_module("late", block(nn.Conv2d(24, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Flatten()))
    model.add_module("dense", block(nn.Linear(32 * 16, 64), nn.BatchNorm1d(64)))
    model.add_module("last", nn.Linear(64, 10))
    return model


def batches(data: Data, size: int, generator: torch.Generator) -> Iterator[Data]:
    """One epoch in a fresh order; what is left over after the last whole batch waits for another."""
    x, y = data
    for some in torch.randperm(len(x), generator=generator).split(size):
        if len(some) == size:
            yield x[some], y[some]


def cross_entropy(model: nn.Module, batch: Data) -> Tensor:
    """The loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, bits: int | Mapping[str, int] | None = None) -> float:
    """Percent of the images that are recognized."""
    model.eval()
    if bits is None:
        return 100 * float((model(data[0]).argmax(1) == data[1]).float().mean())
    with at_bits(model, bits):
        return accuracy(model, data)


def train_float(data: Data, seed: int, settings: Settings, tick: Callable[[], None]) -> nn.Module:
    """The network in fp32, from which every method starts."""
    torch.manual_seed(seed)
    model = network().train()
    optimizer = torch.optim.AdamW(model.parameters(), 2 * settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.float_epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.float_epochs):
        for batch in batches(data, settings.batch, generator):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
        schedule.step()
        tick()
    return model


def make_trainer(
    model: nn.Module,
    precisions: Sequence[int],
    settings: Settings,
    *,
    alrs: bool,
    sampler: HASBSampler | None = None,
) -> JointTrainer:
    """AdamW for the weights, SGD for the scales."""
    scales = scale_parameters(model)
    others = [p for p in model.parameters() if all(p is not s for s in scales)]
    scale_optimizer = torch.optim.SGD(scales, settings.scale_rate)
    return JointTrainer(
        model,
        cross_entropy,
        torch.optim.AdamW(others, settings.learning_rate),
        scale_optimizer,
        precisions=precisions,
        alrs=ALRS(scale_optimizer, settings.scale_rate) if alrs else None,
        sampler=sampler,
    )


def quantized(model: nn.Module, data: Data, precisions: Sequence[int], settings: Settings) -> nn.Module:
    """A copy prepared for training, its learned grids started."""
    choices: dict[str, Activations] = {"learned": "learned", "8": 8, "none": None}
    made = prepare_qat(copy.deepcopy(model), precisions=precisions, activations=choices[settings.activations])
    calibrate(made, data[0][:256], precisions)
    return made.train()


def train_joint(
    model: nn.Module,
    data: Data,
    precisions: Sequence[int],
    seed: int,
    settings: Settings,
    tick: Callable[[], None],
    *,
    alrs: bool = True,
    sampler: HASBSampler | None = None,
) -> nn.Module:
    """The network trained at some precisions at once, rates falling to zero."""
    made = quantized(model, data, precisions, settings)
    trainer = make_trainer(made, precisions, settings, alrs=alrs, sampler=sampler)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, settings.epochs)
    generator = torch.Generator().manual_seed(seed + 1000)
    for epoch in range(settings.epochs):
        made.train()
        trainer.epoch(batches(data, settings.batch, generator), epoch / settings.epochs)
        schedule.step()
        tick()
    return made


def layer_traces(model: nn.Module, data: Data) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Hessian traces of the quantized layers' weights, and those weights, by block."""
    model.eval()
    weights: dict[str, Tensor] = {name: model.get_parameter(f"{name}.0.weight") for name in BLOCKS}
    return hessian_traces(cross_entropy(model, (data[0][:512], data[1][:512])), weights), weights


@dataclass
class Findings:
    """Accuracies in percent: `table[method][bits]` and `table["fp32"][32]` over seeds; mixed beside uniform."""

    table: dict[str, dict[int, list[float]]]
    mixed: dict[str, list[float]]
    allocations: list[dict[str, int]]


def run_mixed(
    model: nn.Module, train: Data, test: Data, seed: int, settings: Settings, tick: Callable[[], None]
) -> tuple[dict[str, int], dict[str, float]]:
    """One network trained with mixed precisions, at allocated bits and at the same number for every layer.

    Both have the same mean over layers: `sizes` would leave the dense layer, five sixths of the weights, no choice.
    """
    traces, weights = layer_traces(model, train)
    sampler = HASBSampler(traces, MIXED_PRECISIONS, seed=seed)
    joint = train_joint(model, train, MIXED_PRECISIONS, seed, settings, tick, sampler=sampler)
    chosen = allocate_bits(traces, weight_errors(weights, MIXED_PRECISIONS), settings.mean_bits)
    return chosen, {
        # by name as well: the first layer's BatchNorm is then at 8 bits in both
        "uniform": accuracy(joint, test, dict.fromkeys(BLOCKS, settings.mean_bits)),
        "allocated": accuracy(joint, test, chosen),
    }


def run(settings: Settings, methods: Sequence[str] = METHODS, *, progress: bool = True) -> Findings:
    """Train everything the table shows.

    Raises:
        FloatingPointError: a loss that is no number.
    """
    train, test = digits()
    table: dict[str, dict[int, list[float]]] = {"fp32": {32: []}}
    table |= {method: {bits: [] for bits in PRECISIONS} for method in methods}
    mixed: dict[str, list[float]] = {"uniform": [], "allocated": []}
    allocations = []
    runs = sum(len(PRECISIONS) if method == "separate" else 1 for method in methods) + 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        epochs = settings.seeds * (settings.float_epochs + runs * settings.epochs)
        task = bar.add_task("training", total=epochs)

        def tick() -> None:
            bar.advance(task)

        for seed in range(settings.seeds):
            bar.update(task, description=f"seed {seed}: fp32")
            model = train_float(train, seed, settings, tick)
            table["fp32"][32].append(accuracy(model, test))
            for method in methods:
                bar.update(task, description=f"seed {seed}: {method}")
                if method == "separate":
                    for bits in PRECISIONS:
                        alone = train_joint(model, train, [bits], seed, settings, tick)
                        table[method][bits].append(accuracy(alone, test, bits))
                    continue
                joint = train_joint(model, train, PRECISIONS, seed, settings, tick, alrs=method == "joint")
                for bits in PRECISIONS:
                    table[method][bits].append(accuracy(joint, test, bits))
            bar.update(task, description=f"seed {seed}: mixed precisions")
            chosen, accuracies = run_mixed(model, train, test, seed, settings, tick)
            allocations.append(chosen)
            for name, value in accuracies.items():
                mixed[name].append(value)
    return Findings(table, mixed, allocations)


def spread(values: Sequence[float]) -> str:
    """Mean and range."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def show(findings: Findings, settings: Settings, console: Console) -> None:
    """The tables a person reads."""
    table = Table(title=f"digits, test accuracy in percent: mean (range) over {settings.seeds} seeds")
    table.add_column("method")
    for bits in PRECISIONS:
        table.add_column(f"{bits} bits", justify="right")
    for method, by_bits in findings.table.items():
        if method != "fp32":
            table.add_row(method, *(spread(by_bits[bits]) for bits in PRECISIONS))
    console.print(table)
    console.print(f"fp32: {spread(findings.table['fp32'][32])}", highlight=False)
    console.print(
        f"at {settings.mean_bits} bits in the mean, trained with mixed precisions: "
        f"uniform {spread(findings.mixed['uniform'])}, allocated {spread(findings.mixed['allocated'])}",
        highlight=False,
    )
    console.print("allocations:", *findings.allocations, highlight=False)


def plot(findings: Findings, path: Path) -> None:
    """A picture of the table: accuracy over bits, one line a method, bars from the worst to the best seed."""
    with needed("tranche.bits train-demo --plot", "matplotlib"):
        import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for offset, (method, by_bits) in enumerate((k, v) for k, v in findings.table.items() if k != "fp32"):
        means = [statistics.mean(by_bits[bits]) for bits in PRECISIONS]
        low = [mean - min(by_bits[bits]) for mean, bits in zip(means, PRECISIONS, strict=True)]
        high = [max(by_bits[bits]) - mean for mean, bits in zip(means, PRECISIONS, strict=True)]
        places = [bits + 0.08 * (offset - 1) for bits in PRECISIONS]
        axes.errorbar(places, means, yerr=[low, high], marker="o", capsize=3, label=method)
    axes.axhline(statistics.mean(findings.table["fp32"][32]), color="gray", linestyle=":", label="fp32")
    axes.set_xticks(PRECISIONS)
    axes.set_xlabel("bits of weights and activations")
    axes.set_ylabel("test accuracy, %")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
