"""Writes measured results into the pages of docs/.

A page holds pairs of lines

    <!-- results: cpu tree_attention -->
    <!-- end of results -->

and `python -m benchmarks.tables` fills the space between with the rows of `benchmarks/results/cpu/*.json` whose op
has that name, so that no figure in the docs was ever typed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def table(machine: str, op: str) -> str:
    """The rows of one op on one machine, as Markdown."""
    lines = []
    for path in sorted((ROOT / "benchmarks/results" / machine).glob("*.json")):
        document = json.loads(path.read_text())
        rows = [row for row in document["rows"] if row["name"].split()[0] == op]
        if not rows:
            continue
        about = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
        lines += [
            f"Measured: {about}.",
            "",
            "| shape | us | GB/s | GFLOP/s | of its limit | times each baseline |",
        ]
        lines += ["| --- | ---: | ---: | ---: | --- | --- |"]
        for row in rows:
            ratios = ", ".join(f"{value[0]:.2f} {name}" for name, value in row["ratios"].items())
            shape = row["name"].removeprefix(op).strip()
            lines.append(
                f"| {shape} | {row['microseconds']:.0f} | {row['gigabytes_per_second']:.1f} | {row['gigaflops']:.0f} "
                f"| {row['percent_of_limit']:.0f}% ({row['bound']}) | {ratios} |"
            )
    return "\n".join(lines) + "\n" if lines else "Not measured yet.\n"


def main() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        before = page.read_text()
        after = BLOCK.sub(lambda match: match[1] + table(match[2], match[3]) + match[4], before)
        if after != before:
            page.write_text(after)
            print(f"updated {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
