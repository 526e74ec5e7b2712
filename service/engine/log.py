"""The engine's output: passed on line by line, the end of it kept, and searched for the root cause when it has died.

The last line of a dead vLLM says that something failed "above"; the first exception says what. That holds for a boot.
Of an engine that served, and of one that a signal ended, the log proves nothing: a request writes there too.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from service.errors import EngineError

KEPT_LINES = 4000
RECENT_S = 10.0  # vLLM's API server ends within a second of its engine core: what is older has no part in a death

# "(EngineCore pid=12) ERROR 11-20 22:01:02 [core.py:1130] " before the text itself
_PREFIX = re.compile(r"^(?:\([\w ]+pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]*\] )?)?")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Failure|Unavailable)(?::\s*\S.*|)$")
_OTHER_CAUSES = re.compile(
    r"^(?:.*\berror: (?:unrecognized arguments|argument |the following arguments|ambiguous option).*"
    r"|Fatal Python error: .*|.*CUDA out of memory.*|terminate called .*|.*Segmentation fault.*"
    r"|memory allocation of \d+ bytes failed.*"
    r"|.*engine core exited unexpectedly.*)$"
)
_NOT_THE_ROOT = re.compile(
    r"Engine core initialization failed|See root cause above|See stack trace \(above\)"
    r"|KeyboardInterrupt|SystemExit|CancelledError"
)
# vLLM's API server about its engine core; with the core's exit code where it did not come up.
_CORE_LOST = re.compile(r"engine core exited unexpectedly|Failed core proc\(s\): \{.*: -9")
_DETAIL_BELOW = re.compile(r"\d+ validation errors? for \w+$")  # pydantic says what is wrong on the next lines
_INNERMOST = 12  # lines of a traceback just above its exception

_SEE_LOG = "Look at the whole log of the engine."
_KILLED = "Another process killed it, or the kernel because memory ran out (see dmesg)."
_OUT_OF_MEMORY = "Serve a smaller model, lower max_model_len, or give this machine or container more memory."
_DAMAGED = "The weights are damaged: delete the model's cache directory and start again."
_TOKENIZER = "The tokenizer is missing or damaged: a model's directory has tokenizer.json beside config.json."
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
    (
        r"contains custom code",
        "Read that code; to run it give the entry hub_id, revision and --trust-remote-code in extra_args.",
    ),
    (r"failed to tokenize", _TOKENIZER),  # of the strings of a reasoning parser
    (r"No space left", "Free disk space."),
    (r"memory allocation of|bad_alloc|MemoryError", _OUT_OF_MEMORY),
    (r"engine core exited", _KILLED),
)
# Where an exception came from tells what to do when its own text does not: "OverflowError: cannot fit 'int'".
_HINTS_BY_ORIGIN = (
    (r"safetensors", _DAMAGED),
    (r"tokenizer", _TOKENIZER),
)


class EngineLog:
    """Keeps the last `KEPT_LINES` lines; thread-safe for one writer and any readers.

    Args:
        on_line: Called with every line.
        clock: Seconds, for tests.
    """

    def __init__(
        self, on_line: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lines: deque[tuple[float, str]] = deque(maxlen=KEPT_LINES)
        self._on_line, self._clock = on_line, clock
        self._closed = threading.Event()

    @property
    def lines(self) -> list[str]:
        """The kept lines, oldest first."""
        return [line for _, line in list(self._lines)]

    @property
    def last_line(self) -> str:
        """The newest line that is not blank."""
        return next((line for line in reversed(self.lines) if line.strip()), "")

    def add(self, line: str) -> None:
        """Take one line without its line end."""
        self._lines.append((self._clock(), line))
        if self._on_line:
            with contextlib.suppress(Exception):  # an observer that raises must not stop the engine
                self._on_line(line)

    def close(self) -> None:
        """Mark the end of the output."""
        self._closed.set()

    def wait_closed(self, timeout_s: float) -> None:
        """Wait until the output has ended."""
        self._closed.wait(timeout_s)

    def describe_exit(
        self, code: int, lived_s: float, ready_after_s: float | None, *, out_of_memory: bool = False
    ) -> EngineError:
        """Return why the engine died: how, when, its root cause or what its log has, next step.

        Args:
            code: Exit code, or the negative number of the signal that ended it.
            lived_s: From its start to its end.
            ready_after_s: From its start until it was ready; None: it never was.
            out_of_memory: The kernel has killed processes meanwhile because memory ran out.
        """
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        if ready_after_s is None:
            when, lines = f"after {lived_s:.1f} s, before it was ready", self.lines
        else:
            when, lines = f"{lived_s - ready_after_s:.1f} s after it was ready", self._recent(lived_s - ready_after_s)
        cause = _root_cause(lines)
        if ready_after_s is None and code >= 0 and cause and not (out_of_memory and _lost_core(lines)):
            return EngineError(f"The engine {how} {when}. Cause: '{cause.text}'.", hint=cause.hint)
        said = f" Its log has, maybe of a request: '{cause.text}'." if cause else ""
        if out_of_memory and (-code == signal.SIGKILL or _lost_core(lines)):
            message = f"The engine {how} {when}: the kernel killed a process because memory ran out.{said}"
            return EngineError(message, hint=_OUT_OF_MEMORY)
        if code < 0:
            return EngineError(f"The engine {how} {when}.{said}", hint=_KILLED if -code == signal.SIGKILL else _SEE_LOG)
        said = said or f" Last line: '{self.last_line}'."
        return EngineError(f"The engine {how} {when}.{said}", hint=cause.hint if cause else _SEE_LOG)

    def _recent(self, served_s: float) -> list[str]:
        """Return the lines of the last seconds, none from before the engine was ready: a boot may survive errors."""
        since = self._clock() - min(RECENT_S, served_s)
        return [line for at, line in list(self._lines) if at >= since]


def _lost_core(lines: list[str]) -> bool:
    return any(_CORE_LOST.search(line) for line in lines)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


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
