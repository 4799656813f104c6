"""What a draft head's parts are worth: `python -m benchmarks.heads [--seeds 3] [--steps 400] [--speed]`.

Trains the demo's head and its twin with a plain MLP from several seeds (each is cached), and prints, for trees of 60
nodes on held-out sources, tokens per pass with their spread over the seeds. With --speed it prints instead how many
times faster than plain decoding each drafter is on the wide model of `benchmarks.decode`, with the head of each seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.decode import HIDDEN, generate_workload
from benchmarks.timing import Sample, Timer, compare
from benchmarks.wide import wide_head
from tranche import byte_llama
from tranche.decode import (
    CascadeDrafter,
    Drafter,
    JakiroDrafter,
    JakiroHead,
    LayerSkipDrafter,
    NgramDrafter,
    RecyclingDrafter,
    generate,
)
from tranche.decode.demo import held_out_prompts
from tranche.decode.demo_head import RECIPE, load_or_train_head

# name, kind of MLP, passes, with the contrastive level
FORMS = (
    ("experts, 5 passes and the contrastive level", "moe", 5, True),
    ("experts, 5 passes", "moe", 5, False),
    ("experts, 6 passes", "moe", 6, False),
    ("plain MLP, 5 passes", "plain", 5, False),
    ("plain MLP, 6 passes", "plain", 6, False),
)
UNTRAINED = {"ngram": NgramDrafter, "recycling": RecyclingDrafter, "layerskip": LayerSkipDrafter}
TEMPERATURES = (0.0, 1.0)


def tokens_per_pass(
    model: PreTrainedModel, drafter: Drafter, prompts: Tensor, new_tokens: int, temperature: float, seed: int
) -> float:
    """With every tree as large as 60 nodes, whatever they cost."""
    drafter.chooses_size = True
    settings = {"max_new_tokens": new_tokens, "eos_token_id": None, "tree_size": 60}
    told = generate(model, drafter, prompts, temperature=temperature, seed=1000 * seed, **settings).statistics
    if told.drafter_error is not None:
        raise RuntimeError(told.drafter_error)
    return told.tokens_per_pass


def spread(values: list[float]) -> str:
    """The mean, and the least and greatest."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def speedup(make: Callable[[], Drafter], repeats: int) -> float:
    """Times plain decoding, greedy, in bf16: the median of pairs."""
    workload = generate_workload(make, "bf16", "cpu")
    pairs = compare(Timer("cpu", 1), workload.ours, workload.baselines["plain"], repeats)[2]
    return Sample.of(pairs).median


def makers_with(head: JakiroHead) -> dict[str, Callable[[], Drafter]]:
    """Every drafter; the cascade learns from call to call."""
    cascade = CascadeDrafter([NgramDrafter(), RecyclingDrafter(), JakiroDrafter(head)])
    return UNTRAINED | {"jakiro": lambda: JakiroDrafter(head), "cascade": lambda: cascade}


def print_speeds(console: Console, seeds: int, repeats: int) -> None:
    """What has nothing to train is measured as often as there are seeds."""
    makers = [makers_with(wide_head(HIDDEN["bf16"], seed).bfloat16()) for seed in range(seeds)]
    console.print("| times plain decoding | greedy |\n| --- | --- |", markup=False)
    for name in makers[0]:
        values = [speedup(of_seed[name], repeats) for of_seed in makers]
        console.print(f"| {name} | {spread(values)} |", markup=False, highlight=False)


def main() -> None:
    """Train, measure, print a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--repeats", type=int, default=6)
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    if arguments.speed:
        return print_speeds(console, arguments.seeds, arguments.repeats)
    model = byte_llama.load_or_train()
    prompts = held_out_prompts(arguments.prompts, 256)

    def row(name: str, make: Callable[[int], Drafter]) -> None:
        cells = []
        for temperature in TEMPERATURES:
            values = [
                tokens_per_pass(model, make(seed), prompts, arguments.new_tokens, temperature, seed)
                for seed in range(arguments.seeds)
            ]
            cells.append(spread(values))
        console.print(f"| {name} | {' | '.join(cells)} |", markup=False, highlight=False)

    console.print("| tokens per pass | greedy | temperature 1 |\n| --- | --- | --- |", markup=False)
    for name, mlp, passes, contrast in FORMS:

        def drafter(seed: int, mlp=mlp, passes=passes, contrast=contrast) -> Drafter:
            recipe = dataclasses.replace(RECIPE, steps=arguments.steps, seed=seed)
            head = load_or_train_head(model, recipe, mlp=mlp)
            return JakiroDrafter(head, passes=passes, contrast=contrast)

        row(name, drafter)
    for name, make in UNTRAINED.items():
        row(name, lambda seed, make=make: make())


if __name__ == "__main__":
    main()
