"""`python -m tranche.decode demo`, and `generate` for a model of one's own."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from tranche import bits
from tranche.decode.demo import DRAFTERS, demo, mismatches_of
from tranche.decode.generation import Output, generate


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tranche.decode", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("generate", help="continue a prompt with a model of your own")
    own.add_argument("--model", required=True, help="folder or name of a transformers causal language model")
    own.add_argument("--drafter", choices=["none", *DRAFTERS], default="ngram")
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
    shown = commands.add_parser("demo", help="all drafters on a byte-level Llama trained on this machine")
    shown.add_argument("--prompts", type=int, default=6)
    shown.add_argument("--length", type=int, default=256, help="bytes of a prompt")
    shown.add_argument("--new-tokens", type=int, default=256)
    shown.add_argument("--temperature", type=float, default=0.0)
    return parser.parse_args()


def _told(name: str, output: Output) -> str:
    told = output.statistics
    because = f" ({told.reason})" if told.reason else ""
    return (
        f"{name}: {told.new_tokens} tokens in {told.target_passes} passes, {told.tokens_per_pass:.2f} tokens a pass, "
        f"{told.tokens_per_second:.1f} tokens/s; equality with plain decoding: {told.guarantee}{because}"
    )


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
    drafter = None if arguments.drafter == "none" else DRAFTERS[arguments.drafter]()
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
    if arguments.command == "demo":
        demo(arguments.prompts, arguments.length, arguments.new_tokens, arguments.temperature)
    else:
        _generate(arguments)


if __name__ == "__main__":
    main()
