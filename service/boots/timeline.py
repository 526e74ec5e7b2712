"""The drawing of boots: a bar a boot, a colour a phase, seconds from zero, which is what somebody waited.

Boots that compare stand together, and those of one model share a scale. What came before a snapshot is told in words,
not drawn: it was paid once. Matplotlib is imported when something is drawn, and its global state is left alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.boots.groups import Group, groups, printable, shortened
from service.boots.records import BootRecord, Span, by_time

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEWEST = 40  # more rows are no picture any more
DPI = 150
WIDTH = 12.0  # inches, as all lengths below
_MARGIN, _INDENT, _APART, _BAR, _ROW, _NOTE, _GAP = 0.25, 0.12, 0.1, 0.22, 0.29, 0.17, 0.07
_SMALL, _TEXT, _LARGE = 7.5, 8.5, 10.0  # points
_FONT = "DejaVu Sans"  # comes with matplotlib
_COLOURS = {
    "queue": "#b8b8c4", "import": "#4878cf", "weights": "#5aa35a", "load": "#9bd08f", "compile": "#8e63b5",
    "graphs": "#c9a6e4", "warm-up": "#f0953f", "sleep": "#8a9aa8", "restore": "#e3b505", "wake": "#2fb5b5",
    "canary": "#d6618f", "ready": "#333a44",
}  # fmt: skip
_OTHERS = ("#a0522d", "#6b8e23", "#00688b", "#cd9b9b", "#8b8b00", "#5d478b")  # phases that this version does not know
_WAITING, _LINE, _FAINT, _INK, _FAILED, _COLD = "#eceef1", "#d0d4da", "#6b7280", "#1f2328", "#b3261e", "#9a5b00"


def drawn(records: Sequence[BootRecord], form: str) -> bytes:
    """Return the picture of the newest boots as `png` or `svg`."""
    import matplotlib.style  # noqa: PLC0415 - 0.3 s that only a picture is worth

    own = {"text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "boots", "font.family": _FONT}
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if form == "svg" else {"Software": None}
    file = io.BytesIO()
    with matplotlib.style.context(["default", own]), _tofu_allowed():  # alike, whatever is in somebody's matplotlibrc
        _Picture(records).figure.savefig(file, format=form, dpi=DPI, metadata=metadata)
    return file.getvalue()


def lanes(spans: Sequence[Span], tolerance: float = 0.0) -> list[tuple[Span, float, float]]:
    """Return each span with its offset and height within a row of height 1: those that overlap share the row.

    Args:
        spans: In any order.
        tolerance: Seconds of overlap that count as none, such as those of a clock's rounding.
    """
    placed: list[tuple[Span, float, float]] = []
    cluster: list[tuple[Span, int]] = []
    ends: list[float] = []  # of the last span in each lane of the cluster
    for span in [*sorted(spans, key=lambda span: (span.start, -span.end)), None]:
        if span is None or (ends and span.start >= max(ends) - tolerance):
            placed += [(each, lane / len(ends), 1 / len(ends)) for each, lane in cluster]
            cluster, ends = [], []
        if span is not None:
            lane = next((number for number, end in enumerate(ends) if span.start >= end - tolerance), len(ends))
            ends[lane : lane + 1] = [span.end]
            cluster.append((span, lane))
    return placed


@contextmanager
def _tofu_allowed() -> Iterator[None]:
    """A letter for which the font has no glyph is drawn as a box: the tables have it."""
    import warnings  # noqa: PLC0415 - with matplotlib

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


@dataclass(frozen=True)
class _Scale:
    """Of one model's rows. Boots that failed after `cut` seconds are cut: a time-out would squeeze all others."""

    seconds: float
    cut: float
    inches_per_second: float


class _Picture:
    """Lays the rows out from the top down on one sheet, measured in inches."""

    def __init__(self, records: Sequence[BootRecord]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - as above
        from matplotlib.figure import Figure  # noqa: PLC0415 - as above

        shown = by_time(records)[-NEWEST:]
        self.figure: Figure = Figure(figsize=(WIDTH, 1), facecolor="white")
        canvas: Any = FigureCanvasAgg(self.figure)
        self._renderer = canvas.get_renderer()
        self._sheet = self.figure.add_axes((0, 0, 1, 1))
        self._colours = _colours(shown)
        kinds = [self._width(text, _TEXT) for group in groups(shown) for text in (group.kind, _typical(group))]
        dates = [self._width(_date(record), _SMALL) for record in shown]
        self._zero = _MARGIN + _INDENT + max(kinds, default=0) + 0.14 + max(dates, default=0) + 0.1
        height = self._draw(shown, len(records)) + _MARGIN / 2
        self.figure.set_size_inches(WIDTH, height)
        self._sheet.set(xlim=(0, WIDTH), ylim=(height, 0))
        self._sheet.set_axis_off()

    def _draw(self, shown: Sequence[BootRecord], of: int) -> float:
        """Draw everything; return where it ends."""
        y = self._legend(self._headline(_MARGIN, shown, of))
        if not shown:
            self._text(_MARGIN, y, "No boots are recorded.")
            return y + 0.2
        scales = {model: self._scale([r for r in shown if r.model == model]) for model in {r.model for r in shown}}
        subjects: dict[str, list[Group]] = {}
        for group in groups(shown):
            subjects.setdefault(group.subject, []).append(group)
        for subject, members in subjects.items():
            y = self._section(subject, members, scales[members[0].model], y)
        return y

    def _headline(self, y: float, shown: Sequence[BootRecord], of: int) -> float:
        self._text(_MARGIN, y + 0.05, "Seconds from asking for a replica until it was ready", _LARGE + 2, weight="bold")
        notes = ["each model on a scale of its own"] if len({record.model for record in shown}) > 1 else []
        notes += [f"the newest {len(shown)} of {of} boots"] if of > len(shown) else []
        self._text(WIDTH - _MARGIN, y + 0.05, "; ".join(notes), colour=_FAINT, ha="right")
        return y + 0.36

    def _legend(self, y: float) -> float:
        x = _MARGIN
        for name, colour in self._colours.items():
            label = shortened(name, 40)
            width = 0.21 + self._width(label, _TEXT)
            if x + width > WIDTH - _MARGIN:
                x, y = _MARGIN, y + 0.22
            self._box(x, y - 0.06, 0.16, 0.12, facecolor=colour)
            self._text(x + 0.21, y, label)
            x += width + 0.16
        return y + 0.12

    def _section(self, subject: str, members: Sequence[Group], scale: _Scale, y: float) -> float:
        title = self._fitted(subject, _LARGE, WIDTH - 2 * _MARGIN)
        self._text(_MARGIN, y + 0.2, title, _LARGE, weight="bold")
        top = y = y + 0.34
        for group in members:
            y = self._group(group, scale, y + _GAP)
        self._axis(scale, top, y + 0.04)
        return y + 0.26

    def _group(self, group: Group, scale: _Scale, y: float) -> float:
        for number, record in enumerate(group.records):
            middle = y + _ROW / 2
            if number == 0:
                self._text(_MARGIN + _INDENT, middle, group.kind, weight="bold")
            elif number == 1:
                self._text(_MARGIN + _INDENT, middle, _typical(group), _SMALL, _FAINT)
            self._text(self._zero - 0.1, middle, _date(record), _SMALL, _FAINT, ha="right")
            self._bar(record, scale, middle - _BAR / 2)
            y += _ROW
            if record.reason:
                said = self._fitted(record.reason, _SMALL, WIDTH - _MARGIN - self._zero)
                self._text(self._zero, y + _NOTE / 2 - 0.03, said, _SMALL, _tone(record), over_lines=True)
                y += _NOTE
        return y

    def _bar(self, record: BootRecord, scale: _Scale, top: float) -> None:
        per_second = scale.inches_per_second
        end = min(record.seconds, scale.cut) * per_second
        failed = {"edgecolor": _FAILED, "hatch": "////"} if record.outcome == "failed" else {}
        self._box(self._zero, top, end, _BAR, facecolor=_WAITING, **failed)
        for span, offset, height in lanes(_waited(record), record.seconds / 200):
            start = min(span.start * per_second, end)
            width = max(min(span.end * per_second, end) - start, 0.012)  # what is short is seen, too
            y = top + offset * _BAR
            self._box(self._zero + start, y, width, height * _BAR, facecolor=self._colours[span.name])
            self._inside(span, self._zero + start + width / 2, y + height * _BAR / 2, width, height)
        if failed:
            self._box(self._zero, top, end, _BAR, fill=False, edgecolor=_FAILED, linewidth=1.5)
        x = self._zero + end + 0.06
        for text, colour in _ends(record, scale):
            weight = "normal" if colour == _FAINT else "bold"
            self._text(x, top + _BAR / 2, text, colour=colour, weight=weight, over_lines=True)
            x += self._width(text, _TEXT) + _APART

    def _inside(self, span: Span, x: float, y: float, width: float, height: float) -> None:
        size = _SMALL if height == 1 else 6.0
        for text in (f"{span.name} {span.end - span.start:.1f}", span.name):
            if height >= 0.5 and self._width(text, size) + 0.06 <= width:
                self._text(x, y, text, size, _readable_on(self._colours[span.name]), ha="center")
                return

    def _axis(self, scale: _Scale, top: float, bottom: float) -> None:
        from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - as above

        for second in MaxNLocator(10, steps=[1, 2, 3, 5, 6, 10]).tick_values(0, scale.seconds):
            if 0 <= second <= scale.seconds:
                x = self._zero + second * scale.inches_per_second
                self._sheet.plot([x, x], [top, bottom], color=_LINE, linewidth=0.6, zorder=0)
                self._text(x, bottom + 0.11, f"{second:g} s", _SMALL, _FAINT, ha="center")

    def _scale(self, records: Sequence[BootRecord]) -> _Scale:
        """Choose what the width stands for: each bar and what is said at its end fit."""
        room = WIDTH - _MARGIN - self._zero
        longest = max((record.seconds for record in records if record.outcome != "failed"), default=0.0)
        cut = 1.2 * (longest or max(record.seconds for record in records)) or 1.0
        scale = _Scale(cut, cut, 0.0)
        said = [0.1 + sum(_APART + self._width(text, _TEXT) for text, _ in _ends(record, scale)) for record in records]
        needed = [min(r.seconds, cut) / (1 - width / room) for r, width in zip(records, said, strict=True)]
        seconds = max(needed) or 1.0
        return _Scale(seconds, cut, room / seconds)

    def _width(self, text: str, points: float) -> float:
        """Return how wide the text is at most, which is in bold."""
        from matplotlib.font_manager import FontProperties  # noqa: PLC0415 - as above

        font = FontProperties(family=_FONT, size=points, weight="bold")
        return float(self._renderer.get_text_width_height_descent(text, font, ismath=False)[0] / self.figure.dpi)

    def _fitted(self, text: str, points: float, width: float) -> str:
        line = shortened(text, 400)
        while (wide := self._width(line, points)) > width:
            line = shortened(text, int(len(line) * min(width / wide, 0.98)))
        return line

    def _text(
        self, x: float, y: float, text: str, size: float = _TEXT, colour: str = _INK, *, over_lines: bool = False,
        **more: Any,
    ) -> None:  # fmt: skip
        if over_lines:
            more["bbox"] = {"facecolor": "white", "linewidth": 0, "pad": 0.6}
        self._sheet.text(x, y, printable(text), fontsize=size, color=colour, va="center_baseline", **more)

    def _box(self, x: float, y: float, width: float, height: float, **more: Any) -> None:
        from matplotlib.patches import Rectangle  # noqa: PLC0415 - as above

        self._sheet.add_patch(Rectangle((x, y), width, height, **{"linewidth": 0, **more}))


def _waited(record: BootRecord) -> list[Span]:
    """Return the phases that somebody waited for, from zero on."""
    rounding = record.seconds / 200  # of the snapshot's last phase, which a clock may let end after zero
    return [
        Span(span.name, max(span.start, 0.0), max(span.end, span.start, 0.0))
        for span in record.phases
        if span.start >= 0 or span.end > rounding
    ]


def _colours(records: Sequence[BootRecord]) -> dict[str, str]:
    """Return the colours of the phases that are drawn, in the order of a boot, unknown ones last."""
    names = {span.name for record in records for span in _waited(record)}
    known = {name: colour for name, colour in _COLOURS.items() if name in names}
    others = sorted(names - known.keys())
    return known | {name: _OTHERS[number % len(_OTHERS)] for number, name in enumerate(others)}


def _readable_on(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _tone(record: BootRecord) -> str:
    return {"ready": _INK, "cold": _COLD}.get(record.outcome, _FAILED)


def _date(record: BootRecord) -> str:
    return f"{record.when:%d %b %H:%M}"


def _typical(group: Group) -> str:
    return f"median {group.median:.1f} s of {len(group.ready_seconds)}" if len(group.ready_seconds) > 1 else ""


def _ends(record: BootRecord, scale: _Scale) -> list[tuple[str, str]]:
    """Return what is said at the end of a bar, in pieces with their colours."""
    cut = "» " if record.seconds > scale.cut else ""
    outcome = "" if record.outcome == "ready" else f"  {shortened(record.outcome, 20)}"
    pieces = [(f"{cut}{record.seconds:.1f} s{outcome}", _tone(record))]
    if record.snapshot_seconds >= 0.5:
        pieces.append((f"+{record.snapshot_seconds:.0f} s once, in the snapshot", _FAINT))
    return pieces
