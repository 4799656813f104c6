"""`python -m tranche.bits train-demo` and `lm-demo`: training for every precision, and a language model at each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from tranche import byte_llama, corpus
from tranche._extras import MissingExtra, require
from tranche.bits import lm_demo, train_demo


def _arguments() -> argparse.Namespace:
    defaults = train_demo.Settings()
    parser = argparse.ArgumentParser(prog="python -m tranche.bits", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train-demo", help="scikit-learn's digits at 8, 6, 4 and 2 bits jointly")
    train.add_argument("--seeds", type=int, default=defaults.seeds)
    train.add_argument("--epochs", type=int, default=defaults.epochs, help="of each quantized training")
    train.add_argument("--activations", choices=("learned", "8", "none"), default=defaults.activations)
    train.add_argument(
        "--scale-rate", type=float, default=defaults.scale_rate, help="learning rate of the scales"
    )
    train.add_argument(
        "--mean-bits",
        type=int,
        choices=train_demo.MIXED_PRECISIONS,
        default=defaults.mean_bits,
        help="of mixed layers",
    )
    train.add_argument("--plot", type=Path, metavar="PATH", help="draw the table there")
    language = commands.add_parser(
        "lm-demo", help="bits per byte of a byte-level Llama trained on this machine"
    )
    language.add_argument("--windows", type=int, default=32, help="of held-out text")
    language.add_argument("--length", type=int, default=256, help="bytes of each")
    return parser.parse_args()


def main() -> int:
    """Run the demo that was asked for."""
    arguments = _arguments()
    # a log has no edge to fit into
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        if arguments.command == "lm-demo":
            text = corpus.standard_library("held_out")
            model = byte_llama.load_or_train()
            lm_demo.show(
                lm_demo.run(model, text, windows=arguments.windows, length=arguments.length), console
            )
            return 0
        settings = train_demo.Settings(
            seeds=arguments.seeds,
            epochs=arguments.epochs,
            activations=arguments.activations,
            scale_rate=arguments.scale_rate,
            mean_bits=arguments.mean_bits,
        )
        if arguments.plot:  # known before the training, not after it
            require("tranche.bits train-demo --plot", "matplotlib")
        findings = train_demo.run(settings)
    except MissingExtra as error:
        raise SystemExit(str(error)) from None
    except FloatingPointError as error:
        console.print(f"[red]{error}")
        return 1
    train_demo.show(findings, settings, console)
    if arguments.plot:
        train_demo.plot(findings, arguments.plot)
        console.print(f"Picture: {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
