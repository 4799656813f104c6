"""Writes measured results into the pages of docs/.

A page holds pairs of lines

    <!-- results: cpu tree_attention -->
    <!-- end of results -->

and `python -m benchmarks.tables` fills the space between with the rows of `benchmarks/results/cpu/*.json` whose op
has that name, so that no figure in the docs was ever typed.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.report import load, markdown_table

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


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


def main() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        before = page.read_text()
        after = BLOCK.sub(lambda match: match[1] + table(match[2], match[3]) + match[4], before)
        if after != before:
            page.write_text(after)
            print(f"updated {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
