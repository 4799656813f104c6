"""Writes measured results into the pages of docs/.

A page holds pairs of lines

    <!-- results: cpu tree_attention -->
    <!-- end of results -->

and `python -m benchmarks.tables` fills the space between with the rows of `benchmarks/results/cpu/*.json` whose op
has that name, so that no figure in the docs was ever typed. README's block `<!-- headline: cpu -->` takes the
rows of HEADLINE.
"""

from __future__ import annotations

import re
from pathlib import Path

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


def headline(machine: str) -> str:
    """The rows of HEADLINE on one machine, each against its best baseline and with the command that repeats it."""
    lines = ["| what | times the best of its baselines | again by |", "| --- | ---: | --- |"]
    about: dict[str, str] = {}
    for path in sorted((ROOT / "benchmarks/results" / machine).glob("*.json")):
        about, results = load(path)
        for r in results:
            if not (r.ratios and any(re.search(pattern, r.name) for pattern in HEADLINE)):
                continue
            name, ratio = min(r.ratios.items(), key=lambda item: item[1][0])
            lines.append(
                f"| {r.name} | {ratio[0]:.2f} ({name}; {ratio[1]:.2f}..{ratio[2]:.2f}) | `{r.command}` |"
            )
    return (
        "\n".join(
            [*lines, "", f"On {about.get('device', 'no machine yet')}, {about.get('threads', 'no')} threads."]
        )
        + "\n"
    )


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
