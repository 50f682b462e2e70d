from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

import msgspec
import pytest
from rich.console import Console

from motet.bench.chart import Series, axis, chart, shares
from motet.bench.figures import Report, report
from motet.bench.page import report_page
from motet.bench.records import Record, Run, Settings
from motet.bench.table import report_table

HOSTILE = "<script>alert(1)</script>&[red]"


def told() -> tuple[Run, Report]:
    settings = Settings(
        "http://there", "sonnet", ("base", HOSTILE), "uniform", 100, 3, concurrency=2, slo={"ttft": 400.0}
    )
    records = (
        Record("base", "warm-up", 0.0, 0.0, (2.0,), 100, 1),
        Record("base", "warm-up", 2.0, 2.0, (2.1,), 100, 1),
        Record("base", "warm-up", 2.2, 2.2, (), None, 0, "timeout", "no end"),
        Record("base", "measured", 3.0, 3.0, (3.3, 3.4, 3.5), 100, 3),
        Record(HOSTILE, "measured", 3.0, 3.0, (3.5, 3.6, 3.7), 100, 3),
        Record(HOSTILE, "measured", 3.5, 3.5, (), None, 0, "http 503", f"busy {HOSTILE}"),
    )
    run = Run(settings, records)
    return run, report(run)


def test_a_page_is_whole_in_itself_and_nothing_in_it_runs() -> None:
    html = report_page(*told())
    assert "alert(1)</script>" not in html
    assert not re.search(r"(src|href)=|url\(|@import|<link", html)
    for svg in re.findall(r"<svg.*?</svg>", html):
        ET.fromstring(svg)
    assert html.count("<svg") == 5
    assert "400.0" in html  # the mean TTFT in milliseconds
    assert "1 of 3 requests failed: http 503" in html


def test_the_figures_stand_in_the_page_as_json() -> None:
    run, figures = told()
    found = re.search(r'id="figures">(.*?)</script>', report_page(run, figures))
    assert found is not None
    assert msgspec.json.decode(found[1], type=Report) == figures


def test_the_table_says_the_figures_and_what_was_odd() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(report_table(told()[1]))
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert re.search(r"TTFT +400\.0 +400\.0 +480\.0 +498\.0 +500\.0", said)
    assert re.search(r"tokens/s +8\.6", said)
    assert re.search(r"goodput +1\.43/s within ttft 400", said)
    assert HOSTILE in said
    assert "1 of 3 requests failed: http 503: busy" in said
    assert "1 requests before those measured failed: timeout: no end" in said
    assert "the first request of base took 2000 ms to its first token, later ones 100 ms" in said


@pytest.mark.parametrize(
    ("largest", "end", "step"),
    [(0, 1, 0.2), (1, 1, 0.2), (7, 8, 2), (0.031, 0.04, 0.01), (99, 100, 20), (1234, 1250, 250)],
)
def test_axes_end_at_round_numbers(largest: float, end: float, step: float) -> None:
    assert axis(largest) == pytest.approx((end, step))


def test_points_are_drawn_where_they_belong() -> None:
    svg = chart("t", "x", "y", [Series("dots", [(0.0, 0.0), (10.0, 5.0)], line=False)])
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in ET.fromstring(svg).iter("circle")]
    assert circles == [(64.0, 254.0), (548.0, 34.0)]
    assert chart("t", "x", "y", [Series("none", [])]) == ""


def test_shares_rise_to_all() -> None:
    series = shares("s", [3.0, 1.0, 2.0, 4.0])
    assert series.points == [(1.0, 25.0), (2.0, 50.0), (3.0, 75.0), (4.0, 100.0)]
    assert len(shares("s", [float(i) for i in range(10_000)]).points) == 201
    assert shares("s", [7.0]).points == [(7.0, 100.0)]
