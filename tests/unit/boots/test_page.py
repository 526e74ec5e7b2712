"""The page of boots: whole in itself, every text a text, and with the names and colours of the console."""

from __future__ import annotations

import re
from pathlib import Path

from service.boots import page
from service.boots.records import Span
from tests.unit.benchmarks.test_report import Parts
from tests.unit.boots.test_records import record

CONSOLE = Path(page.__file__).parents[1] / "console"
HOSTILE = "<script>alert(1)</script>\"'\x1b[31m"


def test_page_of_boots_draws_each_with_its_phases_newest_first() -> None:
    """One scale for a model on a GPU; a phase of the snapshot is named, and no bar."""
    spans = (Span("import", -12.5, 0.0), Span("load", 0.0, 5.0), Span("ready", 5.0, 10.0))
    drawn = page.render(
        [
            record(at="2026-11-20T09:00:00+00:00", phases=spans, seconds=10.0),
            record(at="2026-11-20T09:05:00+00:00", phases=spans[1:2], seconds=20.0, outcome="failed", reason="No GPU."),
        ],
        "this machine",
    )
    assert "<h1>Boots of this machine</h1>" in drawn
    assert "From 2026-11-20 09:00 to 2026-11-20 09:05 UTC." in drawn
    assert re.findall(r"<summary.*?>([\d-]+ [\d:]+)</time>", drawn) == ["2026-11-20 09:05", "2026-11-20 09:00"]
    newest, oldest = drawn.split("<details>")[1:]
    assert '<rect class="c4" x="0.00%" width="25.00%" height="100%">' in newest
    assert "No GPU." in newest
    assert '<rect class="c11" x="25.00%" width="25.00%" height="100%">' in oldest
    assert "<span>import</span><span>in the snapshot</span><span>12.5 s</span>" in oldest
    assert 'class="c3"' not in drawn


def test_page_of_boots_is_whole_in_itself_and_runs_nothing() -> None:
    """No script, link, image or address of anything to fetch; every field of a record is text."""
    fields = ("model", "gpu", "strategy", "outcome", "reason", "id")
    hostile = record(**dict.fromkeys(fields, HOSTILE), versions={HOSTILE: HOSTILE}, phases=(Span(HOSTILE, 0.0, 1.0),))
    drawn = page.render([hostile], "<b>this machine</b>")
    parts = Parts(drawn)
    assert parts.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert parts.attributes.isdisjoint({"src", "href", "onload", "xlink:href"})
    assert not re.search(r"url\(|@import|\x1b", drawn)
    assert drawn.count("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27; [31m") >= len(fields) + 3
    assert "<h1>Boots of &lt;b&gt;" in drawn
    assert "default-src 'none'" in drawn


def test_page_of_no_boots_says_so() -> None:
    """With the figures, which are 0."""
    assert "No boots are recorded." in page.render([], "this machine")


def test_page_of_boots_has_the_phases_and_colours_of_the_console() -> None:
    """A phase looks the same in both."""
    order = re.search(r"const ORDER = \[(.*?)\]", (CONSOLE / "charts.js").read_text(), re.S)
    assert order
    assert tuple(re.findall(r'"([\w-]+)"', order[1])) == page.PHASES
    rules = re.findall(r"\.c(\d+) { fill: (#\w+); background: (#\w+); }", (CONSOLE / "console.css").read_text())
    assert rules == [(str(place), colour, colour) for place, colour in enumerate(page.COLOURS)]
