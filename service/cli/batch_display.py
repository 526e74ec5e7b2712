"""What `vllm-service batch` shows while it runs: a bar on a terminal, a line at intervals elsewhere; to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from service.batch.worker import Progress
from service.cli.terminal import progress_console

_LINE_EVERY_S = 10.0
_NARROWEST = 8


class BatchDisplay:
    """Shows how far a batch is.

    Args:
        total: Lines of the input.
        earlier: Those that had a record before this run.
        clock: In seconds.
    """

    def __init__(self, total: int, earlier: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._earlier, self._clock = total, earlier, clock
        self._console = progress_console()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._shown_at, self._waiting = clock(), ""
        if self._console.is_terminal:
            text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
            bar = BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=_NARROWEST))
            self._bar = Bar(bar, text, console=self._console, transient=True, expand=True)
            self._task = self._bar.add_task("", total=total, completed=earlier)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Show how far it is, and why it waits."""
        if progress.waiting and progress.waiting != self._waiting:
            self._console.print(f"Waiting: {' '.join(progress.waiting.split())[:300]}", markup=False)
        self._waiting = progress.waiting or ""
        text = progress_text(progress, self._total, self._earlier)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=progress.completed + progress.failed, description=text)
        elif self._clock() - self._shown_at >= _LINE_EVERY_S:
            self._shown_at = self._clock()
            self._console.print(text, markup=False)


def progress_text(progress: Progress, total: int, earlier: int) -> str:
    """Return lines, failures, speed and cost: at most 70 characters for a million lines."""
    ended = progress.completed + progress.failed
    here = ended - earlier
    parts = [
        f"{ended:,}/{total:,} lines",
        f"{progress.failed:,} failed" if progress.failed else "",
        f"{progress.tokens_per_s:,.0f} tokens/s",
    ]
    if progress.dollars and here > 0:
        expected = progress.dollars * (total - earlier) / here
        parts.append(f"${progress.dollars:.2f} of ${expected:.2f}")
    return "  ".join(part for part in parts if part)
