"""The examples of README and of the pages run as they are printed, and links lead somewhere."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
RESULTS = re.compile(r"^<!-- results: (\S+) (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")


def blocks(page: Path) -> list[str]:
    return [textwrap.dedent(match[2]) for match in BLOCK.finditer(page.read_text())]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_examples_run(page):
    """One page is one program, top to bottom."""
    namespace: dict[str, object] = {"__name__": "example"}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, example {number}", "exec"), namespace)


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "README.md"))))
def test_an_example_of_readme_runs_alone(number):
    exec(compile(blocks(ROOT / "README.md")[number], "README.md", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for match in LINK.finditer(page.read_text()):
        assert (page.parent / match[1]).exists(), match[1]


def test_every_page_is_linked_from_readme():
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name


def test_every_measured_op_has_its_rows_on_a_page():
    shown = {match for page in PAGES for match in RESULTS.findall(page.read_text())}
    for path in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        for row in json.loads(path.read_text())["rows"]:
            assert (path.parent.name, row["name"].split()[0]) in shown, row["name"]
