"""Writes measured results into the pages of docs/.

A page holds pairs of lines

    <!-- results: cpu tree_attention -->
    <!-- end of results -->

and `python -m benchmarks.tables` fills the space between with the rows of `benchmarks/results/cpu/*.json` whose op
has that name, so that no figure in the docs was ever typed. README's block `<!-- headline: cpu -->` takes the
rows of HEADLINE, and below them says of all rows which are slower than a baseline.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.harness import Result
from benchmarks.report import load, markdown_table

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

HEADLINE_BLOCK = re.compile(r"(<!-- headline: (\S+) -->\n).*?(<!-- end of headline -->)", re.DOTALL)
HEADLINE = (
    r"^tree_attention llama-3-8b B1 N60 L(2048|16384) (bf16|fp32)$",
    r"^tree_verify_sample llama-3 B8 N64 V128256 fp32$",
    r"^moe_draft jakiro H4096 T10 bf16$",
    r"^bits_linear llama-3-8b.o M(8|64) 8bit bf16$",
    r"^pconv_conv2d bar 8x64x56x56 nhwc fp32$",
    r"^decode_generate ngram .* \+48 bf16$",
)


def table(machine: str, op: str) -> str:
    """The rows of one op on one machine, as Markdown."""
    blocks = []
    for path in sorted((ROOT / "benchmarks/results" / machine).glob("*.json")):
        about, results = load(path)
        rows = [r for r in results if r.name.split()[0] == op]
        if rows:
            measured = ", ".join(f"{key} {value}" for key, value in about.items())
            blocks.append(f"Measured: {measured}.\n\n{markdown_table(rows)}")
    return "\n".join(blocks) or "Not measured yet.\n"


def best_baseline(result: Result) -> tuple[str, tuple[float, float, float]]:
    """The baseline that comes nearest to us or passes us, and the ratio to it."""
    return min(result.ratios.items(), key=lambda item: item[1][0])


def slower(results: list[Result]) -> list[str]:
    """A paragraph that names, op by op, the rows whose best baseline is faster than we are."""
    compared: dict[str, list[float]] = {}
    for r in results:
        if r.ratios:
            compared.setdefault(r.name.split()[0], []).append(best_baseline(r)[1][0])
    if not compared:
        return []
    said = []
    for op, ratios in compared.items():
        below = [ratio for ratio in ratios if ratio < 1]
        if below:
            low, high = f"{min(below):.2f}", f"{max(below):.2f}"
            times = low if low == high else f"{low} to {high}"
            said.append(f"`{op}` in {len(below)} of {len(ratios)} rows ({times} times)")
    if not said:
        return ["", "No row is slower than the best of its baselines."]
    return ["", f"Slower than the best of its baselines: {', '.join(said)}."]


def headline(machine: str) -> str:
    """The rows of HEADLINE on one machine, each against its best baseline and with the command that repeats it."""
    lines = ["| what | times the best of its baselines | again by |", "| --- | ---: | --- |"]
    about: dict[str, str] = {}
    everything: list[Result] = []
    for path in sorted((ROOT / "benchmarks/results" / machine).glob("*.json")):
        about, results = load(path)
        everything += results
        for r in results:
            if not (r.ratios and any(re.search(pattern, r.name) for pattern in HEADLINE)):
                continue
            name, ratio = best_baseline(r)
            lines.append(
                f"| {r.name} | {ratio[0]:.2f} ({name}; {ratio[1]:.2f}..{ratio[2]:.2f}) | `{r.command}` |"
            )
    lines += ["", f"On {about.get('device', 'no machine yet')}, {about.get('threads', 'no')} threads."]
    return "\n".join([*lines, *slower(everything)]) + "\n"


def main() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = page.read_text() if page.exists() else ""
        after = BLOCK.sub(lambda match: match[1] + table(match[2], match[3]) + match[4], before)
        after = HEADLINE_BLOCK.sub(lambda match: match[1] + headline(match[2]) + match[3], after)
        if after != before:
            page.write_text(after)
            print(f"updated {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
