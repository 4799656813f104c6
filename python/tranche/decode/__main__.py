"""`python -m tranche.decode demo`, and `generate` for a model of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from tranche import bits
from tranche._extras import MissingExtra
from tranche.decode.cascade import CascadeDrafter
from tranche.decode.demo import DRAFTERS, demo, mismatches_of
from tranche.decode.drafter import Drafter
from tranche.decode.generation import Output, generate
from tranche.decode.head import JakiroHead
from tranche.decode.head_training import HeadRecipe, train_head
from tranche.decode.jakiro import JakiroDrafter
from tranche.decode.ngram import NgramDrafter
from tranche.decode.recycling import RecyclingDrafter


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tranche.decode", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("generate", help="continue a prompt with a model of your own")
    own.add_argument("--model", required=True, help="folder or name of a transformers causal language model")
    own.add_argument("--drafter", choices=["none", *DRAFTERS, "jakiro", "cascade"], default="ngram")
    own.add_argument("--head", help="folder of a trained draft head, for --drafter jakiro and cascade")
    own.add_argument("--prompt", required=True)
    own.add_argument("--max-new-tokens", type=int, default=128)
    own.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    own.add_argument("--top-k", type=int, default=0)
    own.add_argument("--top-p", type=float, default=1.0)
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--tree-size", type=int, default=60, help="most nodes of a draft tree")
    own.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    own.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    own.add_argument(
        "--bits",
        type=int,
        choices=range(2, 9),
        help="quantize all Linear modules and compute at these bits: the exact configuration",
    )
    own.add_argument("--compare", action="store_true", help="also decode plainly, and count mismatches")
    trained = commands.add_parser("train-head", help="train a draft head for a model on a text of your own")
    trained.add_argument(
        "--model", required=True, help="folder or name of a transformers causal language model"
    )
    trained.add_argument("--text", required=True, help="a text file, or a folder of them")
    trained.add_argument(
        "--out", required=True, help="folder for the head; training goes on from what is there"
    )
    trained.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    trained.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    defaults = HeadRecipe()
    trained.add_argument("--steps", type=int, default=defaults.steps)
    trained.add_argument("--batch", type=int, default=defaults.batch)
    trained.add_argument("--length", type=int, default=defaults.length, help="tokens of a window")
    trained.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    trained.add_argument("--seed", type=int, default=defaults.seed)
    shown = commands.add_parser("demo", help="all drafters on a byte-level Llama trained on this machine")
    shown.add_argument("--prompts", type=int, default=6)
    shown.add_argument("--length", type=int, default=256, help="bytes of a prompt")
    shown.add_argument("--new-tokens", type=int, default=256)
    shown.add_argument("--temperature", type=float, default=0.0)
    shown.add_argument("--plot", metavar="FILE", help="draw the accepted lengths")
    return parser.parse_args()


def _told(name: str, output: Output) -> str:
    told = output.statistics
    because = f" ({told.reason})" if told.reason else ""
    return (
        f"{name}: {told.new_tokens} tokens in {told.target_passes} passes, {told.tokens_per_pass:.2f} tokens a pass, "
        f"{told.tokens_per_second:.1f} tokens/s; equality with plain decoding: {told.guarantee}{because}"
    )


def _drafter(arguments: argparse.Namespace) -> Drafter | None:
    if arguments.drafter == "none":
        return None
    if arguments.drafter in DRAFTERS:
        return DRAFTERS[arguments.drafter]()
    if arguments.head is None and arguments.drafter == "jakiro":
        raise SystemExit("--drafter jakiro: expected --head FOLDER, got none. train-head makes one.")
    drafters: list[Drafter] = []
    if arguments.head is not None:
        drafters.append(JakiroDrafter(JakiroHead.load(arguments.head).to(arguments.device)))
    return (
        drafters[0]
        if arguments.drafter == "jakiro"
        else CascadeDrafter([NgramDrafter(), RecyclingDrafter(), *drafters])
    )


def _train_head(arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    source = Path(arguments.text)
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    tokens = [token for file in files for token in tokenizer(file.read_text(errors="replace")).input_ids]
    recipe = HeadRecipe(
        steps=arguments.steps,
        batch=arguments.batch,
        length=arguments.length,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    out = Path(arguments.out)
    model = model.to(arguments.device).eval()
    head = train_head(model, None, torch.tensor(tokens), recipe, checkpoint=out / "training.pt")
    head.save(out)
    Console().print(f"the head is in {out}; use it with --drafter jakiro --head {out}")


def _generate(arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device).eval()
    needs_bits = arguments.drafter == "bitswitch"
    if arguments.bits or needs_bits:
        bits.convert(model, skip=(), bits=arguments.bits or 8)
    prompt = tokenizer(arguments.prompt, return_tensors="pt").input_ids.to(arguments.device)
    settings = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "exact": bool(arguments.bits or needs_bits),
    }
    drafter = _drafter(arguments)
    output = generate(
        model, drafter, prompt, tree_size=arguments.tree_size, streamer=TextStreamer(tokenizer), **settings
    )
    console.print(_told(arguments.drafter, output))
    if arguments.compare:
        plain = generate(model, None, prompt, progress=True, **settings)
        console.print(_told("plain", plain))
        console.print(f"{mismatches_of(output.sequences, plain.sequences)} tokens differ")


def main() -> None:
    """Run the command that was asked for."""
    arguments = _arguments()
    try:
        if arguments.command == "demo":
            demo(
                arguments.prompts,
                arguments.length,
                arguments.new_tokens,
                arguments.temperature,
                arguments.plot,
            )
        elif arguments.command == "train-head":
            _train_head(arguments)
        else:
            _generate(arguments)
    except MissingExtra as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
