"""The report: one file that needs nothing beside it, and the same tables for a terminal."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from kmtr.report.html import Table, text_table, write_report
from kmtr.types import InputError

TABLE = Table(
    "Probe <at> R = 8",
    ("features", "LVEF", "NMSE", "weights"),
    (
        ("mean", "−0.01 [−0.03, 0.00]", None, 0),
        ("masked", "0.78 [0.74, 0.81]", 0.0612, 3_100_000),
        ("aligned", "0.78 [0.75, 0.82]", math.nan, 3_100_000),
        ("image", "0.90 [0.88, 0.91]", 0.0614, 2048),
    ),
    note="Easy phantom.",
    best=(("LVEF", "max"), ("NMSE", "min")),
)


def test_text_table_aligns_numbers_and_stars_the_best() -> None:
    assert text_table(TABLE).splitlines() == [
        "Probe <at> R = 8",
        "features                 LVEF    NMSE     weights",
        "--------  --------------------  ------  ---------",
        "mean      −0.01 [−0.03, 0.00]       –           0",
        "masked      0.78 [0.74, 0.81]   0.061*  3,100,000",
        "aligned     0.78 [0.75, 0.82]       –   3,100,000",
        "image       0.90 [0.88, 0.91]*  0.061*       2048",
        "Easy phantom.",
    ]


def test_what_is_shown_as_the_same_number_is_equally_good() -> None:
    table = Table(
        "t", ("x", "R2"), (("a", "0.78 [0.7, 0.8]"), ("b", "0.78 [0.6, 0.9]"), ("c", 0.5)), best=(("R2", "max"),)
    )
    assert [line.endswith("*") for line in text_table(table).splitlines()[3:]] == [True, True, False]


def test_a_table_without_rows() -> None:
    assert text_table(Table("none", ("a", "b"), ())).splitlines() == ["none", "a  b", "-  -"]


@pytest.mark.parametrize(
    ("rows", "best", "says"),
    [((("a",),), (), "expected 2 cells a row, got 1"), ((), (("c", "max"),), "best of 'c', expected one of a, b")],
)
def test_tables_that_do_not_fit_are_refused(rows: tuple, best: tuple, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Table("t", ("a", "b"), rows, best=best)


class Page(HTMLParser):
    """Collects tags, addresses and text; checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_whole_file(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    path = write_report(
        tmp_path / "new" / "report.html",
        title="A <script>alert(1)</script> & more",
        summary="First line\ncontinued.\n\nSecond <b>paragraph</b>.",
        tables=[TABLE],
        figures=[('A "quoted" caption', figure)],
        footer="run tiny-1",
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert "script" not in page.tags
    assert page.tags.count("p") == 3
    assert [address[:22] for address in page.addresses] == ["data:image/png;base64,"]
    assert "url(" not in text
    assert "@import" not in text
    assert re.findall(r"<b>(.*?)</b>", text) == ["0.061", "0.90 [0.88, 0.91]", "0.061"]
    assert "<td class=n>–</td>" in text
    assert 'alt="A &quot;quoted&quot; caption"' in text
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
