"""The engine's output: passed on line by line, the end of it kept, and read once more when the engine has died.

The last line of a dead vLLM says that something failed "above"; the first exception says what.
"""

from __future__ import annotations

import re
import signal
import threading
from collections import deque
from collections.abc import Callable

KEPT_LINES = 4000

# "(EngineCore pid=12) ERROR 11-20 22:01:02 [core.py:1130] " before the text itself
_PREFIX = re.compile(r"^(?:\([\w ]+pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]*\] )?)?")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Failure|Unavailable)(?::\s*\S.*|)$")
_OTHER_CAUSES = re.compile(
    r"^(?:.*\berror: (?:unrecognized arguments|argument |the following arguments|ambiguous option).*"
    r"|Fatal Python error: .*|.*CUDA out of memory.*|terminate called .*|.*Segmentation fault.*)$"
)
_NOT_THE_ROOT = re.compile(r"Engine core initialization failed|See root cause above|KeyboardInterrupt|SystemExit|CancelledError")

_ADVICE = (
    (re.compile(r"out of memory", re.I), "Choose a GPU with more memory, lower max_model_len, or spread it with SERVICE_N_GPU."),
    (re.compile(r"KV cache is needed|KV cache memory|No available memory for the cache", re.I),
     "Lower max_model_len of the entry or choose a GPU with more memory."),
    (re.compile(r"Address already in use", re.I), "Set SERVICE_PORT to a free port."),
    (re.compile(r"unrecognized arguments|error: argument", re.I), "Correct the entry's extra_args; `vllm serve --help` has them all."),
    (re.compile(r"safetensors|deserializ|incomplete metadata|HeaderTooLarge", re.I), "The weights are damaged: delete the model's cache directory and start again."),
    (re.compile(r"No space left", re.I), "Free disk space."),
)  # fmt: skip


class EngineLog:
    """Keeps the last `KEPT_LINES` lines; thread-safe for one writer and any readers.

    Args:
        on_line: Called with every line.
    """

    def __init__(self, on_line: Callable[[str], None] | None = None) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._on_line = on_line
        self._closed = threading.Event()

    @property
    def lines(self) -> list[str]:
        """The kept lines, oldest first."""
        return list(self._lines)

    @property
    def last_line(self) -> str:
        """The newest line that holds anything."""
        return next((line for line in reversed(self.lines) if line.strip()), "")

    def add(self, line: str) -> None:
        """Take one line without its line end."""
        self._lines.append(line)
        if self._on_line:
            self._on_line(line)

    def close(self) -> None:
        """Mark the end of the output."""
        self._closed.set()

    def wait_closed(self, timeout_s: float) -> None:
        """Wait until the output has ended."""
        self._closed.wait(timeout_s)

    def post_mortem(self, code: int, lived_s: float, ready_after_s: float | None) -> str:
        """Return the sentence that tells why the engine died: exit code, when, root line, next step."""
        when = f"after {lived_s:.1f} s, before it was ready" if ready_after_s is None else f"{lived_s - ready_after_s:.1f} s after it was ready"
        if root := root_line(self.lines):
            advice = next((text for pattern, text in _ADVICE if pattern.search(root)), "The whole log tells more.")
            return f"The engine exited with code {code} {when}. Cause: '{root}'. {advice}"
        if code < 0:
            hint = "The kernel does that when memory runs out (dmesg tells)." if -code == signal.SIGKILL else "The whole log tells more."
            return f"The engine was killed by {signal.Signals(-code).name} {when}. {hint}"
        return f"The engine exited with code {code} {when}. Last line: '{self.last_line}'. The whole log tells more."


def root_line(lines: list[str]) -> str | None:
    """Return the line that names the first cause in an engine's log; None when there is none.

    That is the exception which ends the first traceback: vLLM's processes then each report that another has failed.
    """
    in_traceback = False
    for line in lines:
        text = _PREFIX.sub("", line, count=1)
        if _OTHER_CAUSES.match(text):
            return text.strip()
        if text.startswith("Traceback (most recent call last)"):
            in_traceback = True
        elif in_traceback and _EXCEPTION.match(text) and not _NOT_THE_ROOT.search(text):
            return text.strip()
    return None
