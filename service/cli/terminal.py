"""What `vllm-service` shows: progress and logs on stderr, results and tables on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from service.errors import ServiceError, UsageError
from service.in_engine.vllm_service.events import Event
from service.local.line_file import LineFile

if TYPE_CHECKING:
    from service.engine.installer import InstallProgress
    from service.local.serve import Ready

TABLE_WIDTH = 120  # of lines that are filled; a narrower terminal wraps them
_UNBOUNDED_WIDTH = 10_000  # of tables: a terminal that is narrower wraps whole lines, which reads better than cut cells
_LOGGER = "service"
_OUTPUT_LOGGER = "service.engine.output"
_LINE_EVERY_S = 10.0


def results_console() -> Console:
    """Return the console of results: stdout, as it is written."""
    return Console(highlight=False, soft_wrap=True)


def progress_console() -> Console:
    """Return the console of progress and logs: stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def confirm(question: str, otherwise: str) -> None:
    """Ask on the terminal, and go on at yes.

    Args:
        question: Without its question mark.
        otherwise: What is said at no: `Nothing was deployed`.

    Raises:
        UsageError: Standard input is no terminal.
        ServiceError: The answer was no.
    """
    if not sys.stdin.isatty():
        raise UsageError(
            f"{otherwise}: standard input is no terminal on which this could be confirmed.", hint="Add --yes."
        )
    if not typer.confirm(f"{question}?", err=True):
        raise ServiceError(f"{otherwise}.")


def print_json(value: Any) -> None:
    """Print a result for programs."""
    results_console().print(json.dumps(value, indent=2), markup=False)


def print_table(
    headers: Sequence[str], rows: Iterable[Sequence[RenderableType]], right: Iterable[str] = (), *, stderr: bool = False
) -> None:
    """Print a table whose cells are never cut.

    Args:
        headers: Of the columns.
        rows: Their cells.
        right: The headers of the columns that are aligned to the right.
        stderr: It is no result.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    aligned = set(right)
    for header in headers:
        table.add_column(header, no_wrap=True, justify="right" if header in aligned else "left")
    for row in rows:
        table.add_row(*row)
    Console(stderr=stderr, highlight=False, width=_UNBOUNDED_WIDTH).print(table)


@contextmanager
def logs_shown(show: Callable[[str], None]) -> Iterator[None]:
    """Show the service's logs from level INFO on, less the engine's output.

    Args:
        show: Called with each message.
    """
    logger, handler = logging.getLogger(_LOGGER), _Handler(lambda record: show(record.getMessage()))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class Terminal:
    """The terminal of `vllm-service up`: a spinner and a bar on a terminal, plain lines elsewhere.

    While it is open, the service's logs are shown, and the engine's output is written to a file.

    Args:
        log_file: Where the output of engines and of the installer goes; replaced by each run, and bounded.
        verbose: Show that output here too.
    """

    def __init__(self, log_file: Path, verbose: bool) -> None:
        self._console = progress_console()
        drawn = self._console.is_terminal and not verbose
        self._status = self._console.status("") if drawn else None
        self._bar = _install_bar(self._console) if drawn else None
        self._task: TaskID | None = None
        self._step, self._shown_at = "", 0.0
        self._log_file, self._verbose = log_file, verbose
        self._log: LineFile | None = None  # opened when something is begun: a refused run leaves another's log alone
        self._first_model: str | None = None
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> Self:
        output, handler = logging.getLogger(_OUTPUT_LOGGER), _Handler(self._engine_output)
        self._handlers.enter_context(logs_shown(self._say))
        self._handlers.callback(setattr, output, "propagate", output.propagate)
        self._handlers.callback(output.removeHandler, handler)
        output.propagate = False
        output.addHandler(handler)
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()
        self._clear()
        if self._log:
            self._log.close()

    def phase(self, event: Event) -> None:
        """Show what is being waited for; an event without a label leaves what was shown.

        Raises:
            ServiceError: The engine's output cannot be kept.
        """
        self._open_log()
        if not event.label:
            return
        self._clear()
        if self._status:
            self._status.update(f"{event.label} …")
            self._status.start()
        else:
            self._say(event.label)

    def installing(self, progress: InstallProgress) -> None:
        """Show how far the installation of the engine's environment is."""
        new_step, self._step = progress.step != self._step, progress.step
        if self._bar:
            self._draw(self._bar, progress, new_step)
        elif new_step or time.monotonic() - self._shown_at >= _LINE_EVERY_S:
            self._shown_at = time.monotonic()
            more = f", {progress.detail}" if progress.detail else ""
            self._say(f"{progress.step}: {progress.done} of {progress.total} {progress.unit}{more}")

    def ready(self, ready: Ready) -> None:
        """Print what to paste."""
        self._clear()
        results_console().print(_greeting(ready, self._log_file), markup=False)

    def _draw(self, bar: Progress, progress: InstallProgress, new_step: bool) -> None:
        count = f"{progress.done:,}/{progress.total:,} {progress.unit}"
        if new_step or self._task is None:
            self._clear()
            bar.start()
            self._task = bar.add_task(progress.step, total=progress.total, count="", detail="")
        bar.update(
            self._task, completed=progress.done, total=progress.total, count=count, detail=progress.detail, refresh=True
        )

    def _clear(self) -> None:
        if self._status:
            self._status.stop()
        if self._bar and self._task is not None:
            self._bar.remove_task(self._task)
            self._bar.stop()
            self._task = None

    def _say(self, text: str) -> None:
        """Show a sentence that stays; a download's own progress bars may follow it."""
        self._clear()
        self._console.print(text, markup=False)

    def _engine_output(self, record: logging.LogRecord) -> None:
        model, line = getattr(record, "model", None), record.getMessage()
        self._first_model = self._first_model or model
        if model != self._first_model:
            line = f"{model}: {line}"
        with contextlib.suppress(OSError, ServiceError):  # a full disk must not stop the engine
            self._open_log().write(line)
        if self._verbose:
            self._console.print(line, markup=False)

    def _open_log(self) -> LineFile:
        if self._log is None:
            try:
                self._log_file.parent.mkdir(parents=True, exist_ok=True)
                self._log = LineFile(self._log_file)
            except OSError as error:
                raise ServiceError(
                    f"The engine's output cannot be written to {self._log_file}: {error.strerror}.",
                    hint="Set XDG_STATE_HOME to a directory that you may write to.",
                ) from error
        return self._log


class _Handler(logging.Handler):
    def __init__(self, take: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record)


def _install_bar(console: Console) -> Progress:
    detail = Column(no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[detail]}", table_column=detail, style="dim"),
        console=console,
        transient=True,
    )


def _greeting(ready: Ready, log_file: Path) -> str:
    bearer = " -H 'Authorization: Bearer '\"$API_KEY\"" if ready.needs_key else ""
    key = 'os.environ["API_KEY"]' if ready.needs_key else '"none"'
    imports = "import os\n" if ready.needs_key else ""
    return f"""
Ready after {ready.seconds:.1f} s: {ready.spec.key} at {ready.base_url} (the engine's output: {log_file})

curl {ready.base_url}/chat/completions{bearer} -H 'Content-Type: application/json' \\
  -d '{{"model": "llm", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

{imports}from openai import OpenAI  # pip install openai
client = OpenAI(base_url="{ready.base_url}", api_key={key})
chat = client.chat.completions.create(model="llm", messages=[{{"role": "user", "content": "Hello!"}}])
print(chat.choices[0].message.content)

Ctrl-C stops it."""
