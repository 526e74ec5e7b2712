"""What people see of a prefetch: one bar with bytes, rate and time left, or plain lines where there is no terminal.

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

from service.cli.terminal import print_json, progress_console, results_console
from service.errors import WeightsError
from service.weights.prefetch import Done, Failed, Freed, Order, Said, Settled, Word
from service.weights.revisions import noting
from service.weights.store import Progress

_LINE_EVERY_S = 5.0


class Meter:
    """The progress of one repository at a time. It counts from what was there already: that was no transfer."""

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
        """Show how far it is."""
        if (progress.hub_id, progress.phase) != self._shown:
            self._begin(progress)
        if self._bar and self._task is not None:
            files = f"{progress.files_done}/{progress.files} files"
            self._bar.update(self._task, completed=progress.done_bytes, total=progress.total_bytes or None, files=files)
        elif self._clock() - self._told >= _LINE_EVERY_S:
            self._told = self._clock()
            self.say(self._line(progress))

    def clear(self) -> None:
        """Take the bar away."""
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
                f"{progress.phase} {progress.hub_id}",
                total=progress.total_bytes or None,
                completed=progress.done_bytes,
                files="",
            )

    def _line(self, progress: Progress) -> str:
        passed = self._clock() - self._began
        rate = (progress.done_bytes - self._first) / passed if passed > 0 else 0.0
        left = f", {duration((progress.total_bytes - progress.done_bytes) / rate)} left" if rate else ""
        amount = f"{size(progress.done_bytes)} of {size(progress.total_bytes)}, {size(rate)}/s{left}"
        return f"{progress.phase} {progress.hub_id}: {amount}"


def follow(order: Order, words: Iterable[Word], as_json: bool) -> None:
    """Show the words as they come, and what came of them; record the commits that were settled.

    Args:
        order: What is being done.
        words: What happens.
        as_json: Print an object at the end, for programs.

    Raises:
        WeightsError: Files are damaged or missing, or models cannot be had; which is printed.
    """
    results = results_console()
    done: list[Done] = []
    failed: list[Failed] = []
    freed: list[Freed] = []
    with Meter(progress_console()) as meter:
        note = noting(Path(order.recorded_in) if order.recorded_in else None, meter.say)
        if len(order.specs) > 1:
            meter.say(_announcement(order))
        for word in words:
            if isinstance(word, Progress):
                meter.show(word)
                continue
            meter.clear()
            if isinstance(word, Settled):
                note(word.hub_id, word.commit)
            elif isinstance(word, Said):
                meter.say(word.text)
            elif isinstance(word, Failed):
                failed.append(word)
                meter.say(f"{word.key}: {word.reason}")
            else:
                (done if isinstance(word, Done) else freed).append(word)  # type: ignore[arg-type]
                if not as_json:
                    results.print(sentence(word), markup=False)
    if as_json:
        kinds: dict[str, list[Any]] = {"models": done, "failed": failed, "freed": freed}
        found = {name: [asdict(one) for one in told] for name, told in kinds.items()}
        print_json(found)
    _complain(done, failed)


def _complain(done: list[Done], failed: list[Failed]) -> None:
    if failed:
        raise WeightsError(
            f"{len(failed)} of {len(failed) + len(done)} models cannot be had: {', '.join(one.key for one in failed)}. "
            "What stands above says why."
        )
    if damaged := {one.key: len(one.damage) for one in done if one.damage}:
        raise WeightsError(
            f"Damaged or missing: {sum(damaged.values())} of the files of {', '.join(damaged)}. Fetch them again: "
            f"vllm-service prefetch {' '.join(damaged)}"
        )


def _announcement(order: Order) -> str:
    sizes = [spec.weights_gb for spec in order.specs if spec.hub_id]
    more = f" and {sizes.count(None)} of unknown size" if None in sizes else ""
    total = size(sum(gb or 0 for gb in sizes) * 1e9)
    return f"{len(order.specs)} models, {total}{more} when nothing of it is there yet"


def sentence(word: Done | Freed) -> str:
    """Say what came of it."""
    if isinstance(word, Freed):
        return f"removed {word.hub_id} at {word.revision}: {size(word.size)} freed"
    if word.hub_id is None:
        return f"{word.key}: a directory, nothing to fetch"
    at = f"{word.key}: {word.hub_id} at {word.revision}"
    if word.damage:
        return "\n".join([f"{at} is damaged", *(f"  {line}" for line in word.damage)])
    if not word.size:
        return f"{at} is as the hub has it"
    return f"{at} is complete, {size(word.size)}{'' if word.fetched else ', and was here already'}"


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
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[files]}"))
    return Bar(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True)
