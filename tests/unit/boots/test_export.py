"""The picture and the page of boots, as files; and how bars share a row."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from service.boots import export, timeline
from service.boots.records import BootRecord, Span
from service.errors import ServiceError
from tests.unit.boots.test_records import record

PHASES = (Span("import", -20, -3), Span("queue", 0, 0.4), Span("restore", 0.4, 60), Span("<odd> & new", 50, 180))
EVIL = "<script>alert(1)</script> $x^2_{$ &amp; \x00\x1b[31m"


def png_of(records: Sequence[BootRecord], tmp_path: Path) -> Image.Image:
    """Write the picture and decode it whole."""
    export.png(records, tmp_path / "boots.png")
    picture = Image.open(io.BytesIO((tmp_path / "boots.png").read_bytes()))
    picture.load()
    return picture.convert("RGB")


def html_of(records: Sequence[BootRecord], tmp_path: Path) -> str:
    """Write the page."""
    export.html(records, tmp_path / "boots.html")
    return (tmp_path / "boots.html").read_text()


def boots(count: int, **changes: Any) -> list[BootRecord]:
    """Return records, a minute apart."""
    return [record(at=f"2026-11-20T{n // 60:02}:{n % 60:02}:00+00:00", phases=PHASES, **changes) for n in range(count)]


def has(picture: Image.Image, colour: str) -> bool:
    """Tell whether the picture has a pixel of exactly this colour."""
    wanted = tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return wanted in {found for _, found in picture.getcolors(maxcolors=1 << 24) or []}


def test_png_has_the_width_of_a_screen_and_grows_with_the_rows(tmp_path: Path) -> None:
    """1800 pixels, and a row more for each boot."""
    sizes = [png_of(boots(count), tmp_path).size for count in (1, 3, 40)]

    assert {width for width, _ in sizes} == {round(timeline.WIDTH * timeline.DPI)}
    rows = [(sizes[1][1] - sizes[0][1]) / 2, (sizes[2][1] - sizes[1][1]) / 37]
    assert all(30 < row < 60 for row in rows)


def test_png_of_more_than_the_newest_is_no_higher(tmp_path: Path) -> None:
    """40 rows are what an eye takes in."""
    assert png_of(boots(40), tmp_path).size == png_of(boots(90), tmp_path).size


def test_png_shows_phases_in_their_colours(tmp_path: Path) -> None:
    """Short ones too; what came before the snapshot is not drawn."""
    picture = png_of(boots(1, seconds=180), tmp_path)

    assert all(has(picture, timeline._COLOURS[name]) for name in ("queue", "restore"))
    assert not has(picture, timeline._COLOURS["import"])


def test_png_marks_boots_that_failed(tmp_path: Path) -> None:
    """In red, and no other boot is."""
    assert has(png_of(boots(1, outcome="failed", reason="out of memory"), tmp_path), timeline._FAILED)
    assert not has(png_of(boots(1), tmp_path), timeline._FAILED)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(phases=(), seconds=0.0)],
        [record(phases=(), seconds=0.0, outcome="failed", reason="x" * 5000)],
        [record(phases=(Span("backwards", 9, 3), Span("late", 50, 60), Span("x" * 500, 1, 1)), seconds=4.0)],
        [record(model=EVIL, gpu=EVIL, strategy=EVIL, outcome=EVIL, reason=EVIL, phases=(Span(EVIL, 0, 5),))],
        [record(model="模型" * 100, reason="\ud800"), record(seconds=1e9, outcome="failed")],
        [record(seconds=-5.0)],
    ],
)
def test_picture_of_whatever_a_record_can_hold_is_drawn(records: list[BootRecord], tmp_path: Path) -> None:
    """Nothing at all, no phases, clocks that went back, long texts, formulas, letters without a glyph."""
    assert png_of(records, tmp_path).size[0] == 1800
    ElementTree.fromstring(html_of(records, tmp_path))  # noqa: S314 - what this very test wrote


def bars_and_texts(records: Sequence[BootRecord]) -> tuple[Any, list[Any]]:
    """Return a drawing's figure and its texts, laid out."""
    import matplotlib.style

    with matplotlib.style.context("default"):
        figure = timeline._Picture(records).figure
        figure.draw_without_rendering()
    return figure, [text for text in figure.axes[0].texts if text.get_text()]


def many_kinds() -> list[BootRecord]:
    """Return boots of all kinds, with long names and reasons, a time-out, very short and very long phases."""
    found: list[BootRecord] = []
    for number, each in enumerate(boots(36)):
        strategy = ("off", "cpu", "gpu")[number % 3]
        changes: dict[str, Any] = {"strategy": strategy, "restored": strategy != "off" and number % 2 == 0}
        changes["model"] = ("tiny", "org/a-model-with-" + "a-very-long-name-" * 8, "qwen3-8b")[number // 3 % 3]
        changes["seconds"] = (0.9, 181.3, 37.0)[number // 3 % 3]
        if number % 7 == 0:
            changes |= {"outcome": "failed", "reason": "Engine exited with code 1. " * 12, "seconds": 1800.0}
        if number % 11 == 0:
            changes |= {"outcome": "cold", "reason": "The canary did not match."}
        found.append(dataclasses.replace(each, **changes))
    return found


def test_picture_cuts_no_text_and_lets_none_overlap() -> None:
    """Names, times, totals, reasons, axes and legend each have a place of their own."""
    figure, texts = bars_and_texts(many_kinds())
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    whole = figure.bbox

    for said, box in boxes:
        assert box.x0 >= 0, said
        assert box.x1 <= whole.x1, said
        assert box.y0 >= 0, said
        assert box.y1 <= whole.y1, said
    for number, (said, box) in enumerate(boxes):
        for other, second in boxes[number + 1 :]:
            wide = min(box.x1, second.x1) - max(box.x0, second.x0)
            high = min(box.y1, second.y1) - max(box.y0, second.y0)
            assert wide <= 1 or high <= 2, (said, other)


def test_picture_says_total_kind_snapshot_and_what_is_left_out() -> None:
    """What one looks for first."""
    said = [text.get_text() for text in bars_and_texts(boots(42, seconds=180.0))[1]]

    assert "180.0 s" in said
    assert "+17 s once, in the snapshot" in said
    assert "gpu, restored" in said
    assert "median 180.0 s of 40" in said
    assert "the newest 40 of 42 boots" in said
    assert "qwen3-8b on 2 x H200, without fast boot" in said


def test_drawing_leaves_matplotlibs_state_alone(tmp_path: Path) -> None:
    """No pyplot, whose figures would pile up, and no settings changed."""
    program = f"""
import sys, pathlib, matplotlib
from service.boots import export as charts
from tests.unit.boots.test_export import boots
before = matplotlib.rcParams.copy()
charts.png(boots(2), pathlib.Path({str(tmp_path / "x.png")!r}))
assert dict.__eq__(matplotlib.rcParams.copy(), before)  # the class's own == would choose a backend
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr


def test_import_of_charts_brings_in_no_matplotlib() -> None:
    """Only a picture is worth it."""
    program = "import sys, service.boots.export; print('matplotlib' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False", "False"]


class Page(HTMLParser):
    """Collects the tags and what would be fetched; insists that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag that closes itself."""
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An opening tag."""
        self.tags.append(tag)
        self.open.append(tag)
        said = [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data", "srcset"}]
        self.fetched += [value for value in said if not value.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        """A closing tag."""
        assert self.open.pop() == tag


def test_html_is_one_page_that_needs_no_network(tmp_path: Path) -> None:
    """Well-formed; nothing is fetched, no script runs, and its own policy forbids both."""
    text = html_of(boots(3), tmp_path)
    page = Page(text)
    ElementTree.fromstring(text)  # noqa: S314 - what this very test wrote

    assert text.startswith("<!DOCTYPE html>")
    assert page.open == []
    assert page.fetched == []
    assert {"svg", "table", "style"} <= set(page.tags)
    assert not {"script", "link", "img", "iframe", "object", "foreignobject"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "default-src 'none'" in text


def test_html_escapes_what_a_record_says(tmp_path: Path) -> None:
    """A model may be called anything; everywhere, the picture's own comments too."""
    changes = dict.fromkeys(("model", "gpu", "outcome"), EVIL) | dict.fromkeys(("strategy", "reason"), "--><script>x")
    evil = record(**changes, versions={EVIL: EVIL}, phases=(Span(EVIL, 0, 5),))
    page = Page(text := html_of([evil], tmp_path))

    assert "script" not in page.tags
    assert "<script" not in re.sub(r"<!--.*?-->", "", text, flags=re.S)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not {"\x00", "\x1b"} & set(text)


def test_html_tells_every_record_and_every_phase(tmp_path: Path) -> None:
    """Those that are not in the picture too, newest first, with what the snapshot took."""
    records = boots(50, reason="a & b")
    text = html_of(records, tmp_path)
    table = text[text.index("All boots") :]

    assert [table.index(one.id) for one in reversed(records)] == sorted(table.index(one.id) for one in records)
    assert "import -20.0 to -3.0, queue 0.0 to 0.4, restore 0.4 to 60.0, &lt;odd&gt; &amp; new 50.0 to 180.0" in table
    assert "a &amp; b" in table
    assert "What is typical" in text


@pytest.mark.parametrize("write", [export.png, export.html])
@pytest.mark.parametrize("place", ["/dev/null/boots", "none/boots", "/", "directory", "x" * 300])
def test_file_that_cannot_be_written_is_a_sentence_and_leaves_nothing(
    write: Any, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such directory, a file in its place, a directory of that name, a name too long."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    with pytest.raises(ServiceError, match=r"cannot be written: .+\. Name a file in a directory") as raised:
        write(boots(1), Path(place))

    assert f"'{place}'" in str(raised.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "directory"]


def test_file_that_was_there_is_replaced_whole(tmp_path: Path) -> None:
    """And readable by whom new files are."""
    (tmp_path / "boots.png").write_text("old")
    png_of(boots(1), tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["boots.png"]


@pytest.mark.parametrize(
    ("spans", "places"),
    [
        ([("a", 0, 5), ("b", 5, 9)], {"a": (0, 1), "b": (0, 1)}),
        ([("a", 0, 5), ("b", 4.99, 9)], {"a": (0, 1), "b": (0, 1)}),
        ([("a", 0, 5), ("b", 3, 9)], {"a": (0, 0.5), "b": (0.5, 0.5)}),
        ([("c", 9, 12), ("b", 2, 9), ("a", 0, 8)], {"a": (0, 0.5), "b": (0.5, 0.5), "c": (0, 1)}),
        ([("all", 0, 9), ("a", 0, 3), ("b", 3, 6)], {"all": (0, 0.5), "a": (0.5, 0.5), "b": (0.5, 0.5)}),
        ([("a", 0, 9), ("b", 1, 8), ("c", 2, 7)], {"a": (0, 1 / 3), "b": (1 / 3, 1 / 3), "c": (2 / 3, 1 / 3)}),
        ([], {}),
    ],
)
def test_spans_that_overlap_share_the_row(
    spans: list[tuple[str, float, float]], places: dict[str, tuple[float, float]]
) -> None:
    """Others have all of it; a clock's rounding is no overlap."""
    laid = timeline.lanes([Span(*span) for span in spans], tolerance=0.05)

    assert {span.name: (offset, height) for span, offset, height in laid} == places
