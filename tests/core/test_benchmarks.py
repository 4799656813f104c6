"""The report that benchmarks write, on results made up here."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks import harness, report, tables
from benchmarks.timing import Sample


@pytest.fixture
def result() -> harness.Result:
    return harness.Result(
        family="tree",
        name="tree_attention llama-3-8b B1 (N60) fp32",
        microseconds=100.0,
        spread=(90.0, 110.0),
        gigabytes_per_second=1.5,
        gigaflops=20.0,
        percent_of_limit=50.0,
        bound="memory",
        error=1e-6,
        ratios={"sdpa": (2.0, 1.9, 2.1), "packed": (3.0, 2.9, 3.1)},
        bars={"sdpa": 1.5, "best": 1.5},
        command="",
    )


def test_a_met_bar_is_no_complaint(result):
    assert result.missed_bars() == []


@pytest.mark.parametrize(
    ("bars", "said"), [({"sdpa": 2.5}, "2.00x sdpa"), ({"best": 2.5}, "2.00x best"), ({"flex": 1}, "nan")]
)
def test_a_missed_bar_is_named(result, bars, said):
    (complaint,) = replace(result, bars=bars).missed_bars()
    assert said in complaint and result.name in complaint


@pytest.mark.parametrize(
    ("least", "missed"), [(None, []), (50.0, []), (50.5, ["50% of its limit (memory), "])]
)
def test_the_least_percent_of_the_limit_is_a_bar(result, least, missed):
    complaints = replace(result, least_percent=least).missed_bars()
    assert len(complaints) == len(missed)
    assert all(said in complaint for said, complaint in zip(missed, complaints, strict=True))


def test_a_limit_that_was_not_measured_misses_its_bar(result):
    assert replace(result, least_percent=80.0, percent_of_limit=math.nan).missed_bars()


def test_what_is_saved_is_loaded(result, tmp_path):
    report.save([result], "cpu", tmp_path / "r.json")
    about, rows = report.load(tmp_path / "r.json")
    assert about["torch"] and about["commit"] and about["device"]
    assert rows[0].name == result.name and rows[0].microseconds == result.microseconds


def test_only_a_row_that_became_slower_is_complained_of(result, tmp_path):
    report.save([result], "cpu", tmp_path / "r.json")
    slower = replace(result, microseconds=104.0)
    assert report.slower_than([slower], tmp_path / "r.json", 0.05) == []
    (complaint,) = report.slower_than([slower], tmp_path / "r.json", 0.03)
    assert "104.0 us, was 100.0 us" in complaint
    assert report.slower_than([replace(slower, name="another")], tmp_path / "r.json", 0.03) == []


def test_the_report_has_a_table_and_a_picture_per_family(result, tmp_path):
    other = replace(result, family="bits", name="bits_linear M1", bars={"best": 9}, least_percent=85.0)
    page = report.write([result, other], "cpu", tmp_path).read_text()
    assert "| tree | 1 | 2.00 | 2.00 | 2.00 | 0 |" in page
    assert "| bits | 1 | 2.00 | 2.00 | 2.00 | 2 |" in page
    assert "below its bar: bits_linear M1: 2.00x best, the bar is 9x" in page
    assert "below its bar: bits_linear M1: 50% of its limit (memory), the bar is 85%" in page
    assert "2.00 sdpa (1.90..2.10), 3.00 packed (2.90..3.10)" in page
    for family in ("tree", "bits"):
        assert f"roofline-{family}.png" in page
        assert (tmp_path / f"roofline-{family}.png").stat().st_size > 1000


def test_a_row_is_repeated_alone_by_its_command(result):
    pattern = f"^{harness._pattern(result.name)}$"
    assert re.search(pattern, result.name)
    assert not re.search(pattern, result.name.replace("(N60)", "N60"))


def test_pages_take_their_figures_from_results(result, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/tree.md"
    page.write_text("# A page\n<!-- results: cpu tree_attention -->\nold\n<!-- end of results -->\nend\n")
    tables.main()
    assert "Not measured yet." in page.read_text()
    report.save([result], "cpu", tmp_path / "benchmarks/results/cpu/tree.json")
    tables.main()
    text = page.read_text()
    assert "| tree_attention llama-3-8b B1 (N60) fp32 | 100 (90..110) |" in text and text.endswith(
        "-->\nend\n"
    )
    assert "old" not in text


def test_the_headline_says_where_a_baseline_is_faster(result):
    def row(name: str, *ratios: float) -> harness.Result:
        return replace(result, name=name, ratios={f"b{i}": (x, x, x) for i, x in enumerate(ratios)})

    faster = row("moe_draft T1", 1.5, 2.0)
    assert tables.slower([]) == []
    assert tables.slower([faster]) == ["", "No row is slower than the best of its baselines."]
    rows = [faster, row("bits M1", 3, 0.64), row("bits M2", 0.9), row("bits M8", 1), row("mlp a", 0.87, 0.9)]
    assert tables.slower([*rows, row("alone")]) == [
        "",
        "Slower than the best of its baselines: `bits` in 2 of 3 rows (0.64 to 0.90 times), "
        "`mlp` in 1 of 1 rows (0.87 times).",
    ]


def test_readme_says_it_below_the_headline(result, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    report.save(
        [replace(result, ratios={"sdpa": (0.5, 0.4, 0.6)})],
        "cpu",
        tmp_path / "benchmarks/results/cpu/tree.json",
    )
    (tmp_path / "README.md").write_text("<!-- headline: cpu -->\nold\n<!-- end of headline -->\n")
    tables.main()
    text = (tmp_path / "README.md").read_text()
    assert "baselines: `tree_attention` in 1 of 1 rows (0.50 times).\n<!-- end of headline -->" in text


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({}, False),
        ({"spread": (60.0, 120.0)}, False),
        ({"spread": (60.0, 121.0)}, True),
        ({"percent_of_limit": 115.0}, False),
        ({"percent_of_limit": 116.0}, True),
    ],
)
def test_a_disturbed_row_is_called_noisy(result, change, warned):
    console = Console(width=300, record=True, quiet=False, file=io.StringIO())
    row = replace(result, **change)
    report.show([row], console)
    said = f"{row.name}: noisy: close other programs and run it again"
    assert (said in console.export_text()) == warned
    assert (said in report.markdown_summary([row], {})) == warned


def test_a_sample_is_median_and_quartiles():
    assert Sample.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Sample(3.0, 2.0, 4.0)
