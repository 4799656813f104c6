"""`python -m tranche.pconv train-demo`: train a small PartialNet, and search its ratios, on real images."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from tranche._extras import MissingExtra, require
from tranche.pconv import demo


def main() -> None:
    """Parse the arguments and run the demonstration."""
    parser = argparse.ArgumentParser(prog="python -m tranche.pconv", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train-demo", help="PartialNet-tiny and a DPConv search on scikit-learn's digits"
    )
    train.add_argument("--epochs", type=int, default=25, help="of each of the three trainings")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cpu")
    train.add_argument("--plot", type=Path, metavar="PATH", help="a picture of the result")
    arguments = parser.parse_args()
    console = Console()
    try:
        if arguments.plot is not None:  # known before the training, not after it
            require("tranche.pconv train-demo --plot", "matplotlib")
        outcome = demo.train(arguments.epochs, arguments.seed, arguments.device)
    except MissingExtra as error:
        raise SystemExit(str(error)) from None
    demo.show(outcome, console)
    if arguments.plot is not None:
        demo.plot(outcome, arguments.plot)
        console.print(f"Drawn to {arguments.plot}", highlight=False)


if __name__ == "__main__":
    main()
