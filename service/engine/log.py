"""The engine's output: passed on line by line, the end of it kept, and searched for the root cause when it has died.

The last line of a dead vLLM says that something failed "above"; the first exception says what.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from service.errors import EngineError

KEPT_LINES = 4000

# "(EngineCore pid=12) ERROR 11-20 22:01:02 [core.py:1130] " before the text itself
_PREFIX = re.compile(r"^(?:\([\w ]+pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]*\] )?)?")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Failure|Unavailable)(?::\s*\S.*|)$")
_OTHER_CAUSES = re.compile(
    r"^(?:.*\berror: (?:unrecognized arguments|argument |the following arguments|ambiguous option).*"
    r"|Fatal Python error: .*|.*CUDA out of memory.*|terminate called .*|.*Segmentation fault.*"
    r"|.*engine core exited unexpectedly.*)$"
)
_NOT_THE_ROOT = re.compile(
    r"Engine core initialization failed|See root cause above|See stack trace \(above\)"
    r"|KeyboardInterrupt|SystemExit|CancelledError"
)
_DETAIL_BELOW = re.compile(r"\d+ validation errors? for \w+$")  # pydantic says what is wrong on the next lines
_INNERMOST = 12  # lines of a traceback just above its exception

_SEE_LOG = "Look at the whole log of the engine."
_DAMAGED = "The weights are damaged: delete the model's cache directory and start again."
_EXTRA_ARGS = "Correct the entry's extra_args; `vllm serve --help` has them all."
_HINTS = (
    (r"out of memory", "Choose a GPU with more memory, lower max_model_len, or spread it with SERVICE_N_GPU."),
    (
        r"KV cache is needed|KV cache memory|No available memory for the cache",
        "Lower max_model_len of the entry or choose a GPU with more memory.",
    ),
    (r"less than requested memory for kv", "Correct the entry's extra_args, or free memory."),
    (r"max_model_len .* is greater than", "Lower max_model_len of the entry to what the model allows."),
    (r"reasoning parser|tool call parser", "Correct the entry's reasoning_parser or tool_call_parser."),
    (r"Address already in use", "Set SERVICE_PORT to a free port."),
    (r"unrecognized arguments|error: argument", _EXTRA_ARGS),
    (r"safetensors|deserializ|incomplete metadata|HeaderTooLarge", _DAMAGED),
    (r"No space left", "Free disk space."),
    (r"engine core exited", "Another process killed it; the kernel does so when memory runs out (see dmesg)."),
)
# Where an exception came from tells what to do when its own text does not: "OverflowError: cannot fit 'int'".
_HINTS_BY_ORIGIN = (
    (r"safetensors", _DAMAGED),
    (r"tokenizer", "The tokenizer is missing or damaged: a model's directory has tokenizer.json beside config.json."),
)


class EngineLog:
    """Keeps the last `KEPT_LINES` lines; thread-safe for one writer and any readers.

    Args:
        on_line: Called with every line.
    """

    def __init__(self, on_line: Callable[[str], None] | None = None) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._newer = 0  # lines since the engine was ready, or since the start
        self._on_line = on_line
        self._closed = threading.Event()

    @property
    def lines(self) -> list[str]:
        """The kept lines, oldest first."""
        return list(self._lines)

    @property
    def last_line(self) -> str:
        """The newest line that is not blank."""
        return next((line for line in reversed(self.lines) if line.strip()), "")

    def add(self, line: str) -> None:
        """Take one line without its line end."""
        self._lines.append(line)
        self._newer += 1
        if self._on_line:
            with contextlib.suppress(Exception):  # an observer that raises must not stop the engine
                self._on_line(line)

    def mark_ready(self) -> None:
        """Search no lines before this for the cause of a death: what a finished boot complained of is none."""
        self._newer = 0

    def close(self) -> None:
        """Mark the end of the output."""
        self._closed.set()

    def wait_closed(self, timeout_s: float) -> None:
        """Wait until the output has ended."""
        self._closed.wait(timeout_s)

    def describe_exit(self, code: int, lived_s: float, ready_after_s: float | None) -> EngineError:
        """Return why the engine died: exit code, when, root cause, next step."""
        if ready_after_s is None:
            when = f"after {lived_s:.1f} s, before it was ready"
        else:
            when = f"{lived_s - ready_after_s:.1f} s after it was ready"
        lines = self.lines
        if cause := _root_cause(lines[max(0, len(lines) - self._newer) :]):
            return EngineError(f"The engine exited with code {code} {when}. Cause: '{cause.text}'.", hint=cause.hint)
        if code < 0:
            oom = "The kernel does that when memory runs out (see dmesg)."
            hint = oom if -code == signal.SIGKILL else _SEE_LOG
            return EngineError(f"The engine was killed by {signal.Signals(-code).name} {when}.", hint=hint)
        return EngineError(f"The engine exited with code {code} {when}. Last line: '{self.last_line}'.", hint=_SEE_LOG)


@dataclass(frozen=True)
class _Cause:
    """The text of an error, and the lines of its traceback just above it."""

    text: str
    origin: str = ""

    @property
    def hint(self) -> str:
        by_text = (hint for pattern, hint in _HINTS if re.search(pattern, self.text, re.I))
        by_origin = (hint for pattern, hint in _HINTS_BY_ORIGIN if re.search(pattern, self.origin, re.I))
        return next(by_text, None) or next(by_origin, None) or _SEE_LOG


def _root_cause(lines: list[str]) -> _Cause | None:
    """Return the first cause in an engine's log; None when there is none.

    That is the exception which ends the first traceback: vLLM's processes then each report that another has failed.
    """
    traceback: list[str] | None = None
    for number, line in enumerate(lines):
        text = _bare(line)
        if _OTHER_CAUSES.match(text):
            return _Cause(text.strip())
        if text.startswith("Traceback (most recent call last)"):
            traceback = []
        elif traceback is not None and _EXCEPTION.match(text) and not _NOT_THE_ROOT.search(text):
            detail = _bare(lines[number + 1]).partition(" [type=")[0].strip() if number + 1 < len(lines) else ""
            whole = f"{text.strip()}: {detail}" if _DETAIL_BELOW.search(text) else text.strip()
            return _Cause(whole, "\n".join(traceback[-_INNERMOST:]))
        elif traceback is not None:
            traceback.append(text)
    return None


def _bare(line: str) -> str:
    """Return a line without the process, level and time that vLLM puts before it."""
    return _PREFIX.sub("", line, count=1)
