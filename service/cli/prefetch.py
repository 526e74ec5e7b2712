"""Shows a prefetch: one bar with bytes, rate and time left, or plain lines where there is no terminal.

Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from service.boots.groups import shortened
from service.cli.terminal import print_json, progress_console, results_console
from service.errors import WeightsError
from service.weights.files import label
from service.weights.prefetch import (
    Message,
    ModelFailed,
    ModelReady,
    PrefetchEvent,
    PrefetchRequest,
    RevisionRemoved,
    RevisionResolved,
)
from service.weights.progress import Progress
from service.weights.revisions import record_commit

_LINE_EVERY_S = 5.0
_BAR_WIDTH = 59  # of the bar's other columns: `━━━━━━━━━━ 100.0/629.2 MB 13/17 files 169.2 MB/s 0:00:10`


class ProgressDisplay:
    """The progress of one repository at a time. Rates count from the bytes that were there at the start."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._bar = _bar(console) if console.is_terminal else None
        self._task: TaskID | None = None
        self._shown: tuple[str, str] | None = None
        self._began = self._told = 0.0
        self._first = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Show a sentence that stays."""
        self._console.print(text, markup=False)

    def show(self, progress: Progress) -> None:
        """Show progress."""
        if (progress.hub_id, progress.phase) != self._shown:
            self._begin(progress)
        if self._bar and self._task is not None:
            files = f"{progress.files_done}/{progress.files} files"
            self._bar.update(self._task, completed=progress.done_bytes, total=progress.total_bytes or None, files=files)
        elif self._clock() - self._told >= _LINE_EVERY_S:
            self._told = self._clock()
            self.say(self._line(progress))

    def clear(self) -> None:
        """Remove the bar."""
        if self._bar and self._task is not None:
            self._bar.remove_task(self._task)
            self._bar.stop()
        self._task = self._shown = None

    def _begin(self, progress: Progress) -> None:
        self.clear()
        self._shown = (progress.hub_id, progress.phase)
        self._began = self._told = self._clock()
        self._first = progress.done_bytes
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(
                shortened(f"{progress.phase} {label(progress.hub_id)}", max(20, self._console.width - _BAR_WIDTH)),
                total=progress.total_bytes or None,
                completed=progress.done_bytes,
                files="",
            )

    def _line(self, progress: Progress) -> str:
        passed = self._clock() - self._began
        rate = (progress.done_bytes - self._first) / passed if passed > 0 else 0.0
        left = f", {duration((progress.total_bytes - progress.done_bytes) / rate)} left" if rate else ""
        amount = f"{size(progress.done_bytes)} of {size(progress.total_bytes)}, {size(rate)}/s{left}"
        return f"{progress.phase} {label(progress.hub_id)}: {amount}"


def follow(
    request: PrefetchRequest,
    events: Iterable[PrefetchEvent],
    as_json: bool,
    *,
    on_modal: bool = False,
    results: Console | None = None,
) -> None:
    """Show the events as they come and the results; record the commits that were resolved.

    Args:
        request: What is being done.
        events: What happens.
        as_json: Print one JSON object at the end.
        on_modal: It is done on Modal, for the command that an error advises.
        results: Where results go; None: to stdout.

    Raises:
        WeightsError: Files are damaged or missing, or models could not be fetched; which ones is printed.
    """
    results = results or results_console()
    ready: list[ModelReady] = []
    failed: list[ModelFailed] = []
    removed: list[RevisionRemoved] = []
    lock_file = Path(request.recorded_in) if request.recorded_in else None
    with ProgressDisplay(progress_console()) as display:
        if len(request.specs) > 1:
            display.say(_announcement(request))
        for event in events:
            if isinstance(event, Progress):
                display.show(event)
                continue
            display.clear()
            if isinstance(event, RevisionResolved):
                where = record_commit(lock_file, event.hub_id, event.commit)
                display.say(f"{label(event.hub_id)} is at {event.commit}, recorded in {where}")
            elif isinstance(event, Message):
                display.say(event.text)
            elif isinstance(event, ModelFailed):
                failed.append(event)
                display.say(f"{event.key}: {event.reason}")
            else:
                (ready if isinstance(event, ModelReady) else removed).append(event)  # type: ignore[arg-type]
                if not as_json:
                    results.print(describe(event), markup=False)
    if as_json:
        kinds: dict[str, list[Any]] = {"models": ready, "failed": failed, "freed": removed}
        print_json({name: [asdict(result) for result in found] for name, found in kinds.items()})
    _raise_failures(request, ready, failed, "vllm-service prefetch --modal" if on_modal else "vllm-service prefetch")


def _raise_failures(request: PrefetchRequest, ready: list[ModelReady], failed: list[ModelFailed], command: str) -> None:
    if failed:
        raise WeightsError(
            f"{len(failed)} of {len(failed) + len(ready)} models could not be fetched: "
            f"{', '.join(one.key for one in failed)}.",
            hint="The reasons are above.",
        )
    if damaged := [one for one in ready if one.damage]:
        files = sum(len(one.damage) for one in damaged)
        names = [one.key if request.recorded_in else one.hub_id or one.key for one in damaged]  # as the user may write
        raise WeightsError(
            f"Damaged or missing: {files} of the files of {', '.join(one.key for one in damaged)}.",
            hint=f"Fetch them again: {command} {' '.join(names)}",
        )


def _announcement(request: PrefetchRequest) -> str:
    sizes = [spec.weights_gb for spec in request.specs if spec.hub_id]
    more = f" and {sizes.count(None)} of unknown size" if None in sizes else ""
    total = size(sum(gb or 0 for gb in sizes) * 1e9)
    return f"{len(request.specs)} models, {total}{more} when nothing is in the cache yet"


def describe(event: ModelReady | RevisionRemoved) -> str:
    """Return a result in words."""
    if isinstance(event, RevisionRemoved):
        return f"removed {label(event.hub_id)} at {event.revision}: {size(event.size)} freed"
    if event.hub_id is None:
        return f"{event.key}: a directory, nothing to fetch"
    at = f"{event.key}: {label(event.hub_id)} at {event.revision}"
    if event.damage:
        return "\n".join([f"{at} is damaged", *(f"  {line}" for line in event.damage)])
    if not event.size:
        return f"{at} matches its checksums"
    return f"{at} is complete, {size(event.size)}{'' if event.fetched else ', already in the cache'}"


def size(count: float) -> str:
    """Return an amount of bytes in words: `9.4 GB`, `830 kB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}" if count < 100 * factor else f"{count / factor:.0f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Return a time in words: `45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def _bar(console: Console) -> Bar:
    columns = (TextColumn("{task.description}"), BarColumn(10), DownloadColumn(), TextColumn("{task.fields[files]}"))
    return Bar(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True)
