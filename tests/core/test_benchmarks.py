"""The report that benchmarks write, on results made up here."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

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


def test_a_sample_is_median_and_quartiles():
    assert Sample.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Sample(3.0, 2.0, 4.0)
