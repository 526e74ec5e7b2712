"""Runs vLLM's own benchmark in the engine's environment, and reads from it what each request took.

It was chosen over guidellm (0.8.1), which takes an environment of 1.2 GB of its own and four times as long for the same
20 requests; where `up` has run, this one takes nothing more. One thing that it gets wrong is put right here: a stream
that ends with an error event counts there as answered.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from service import interrupts
from service.benchmarks.report import RequestRecord
from service.engine.process_group import kill_group
from service.errors import ServiceError

_IN_ENGINE = Path(__file__).parents[1] / "in_engine"
_KEPT = ("HOME", "PATH", "LANG", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "LD_LIBRARY_PATH", "XDG_CACHE_HOME")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_PROGRESS = re.compile(rb"\| *(\d+)/\d+ \[")  # tqdm's: "  5%|5         | 1/20 [00:00<00:04,  4.38it/s]"
_PHRASES = {status.phrase: f"{status.value} {status.phrase}" for status in HTTPStatus}
_MODULES = re.compile(r"^(\w+\.)+(?=[A-Z])")  # of an exception's class
_ERROR_LENGTH = 100
_KILL_S = 5.0
CUT_SHORT = "the stream ended before its last token"


@dataclass(frozen=True)
class Job:
    """What to send.

    Attributes:
        url: Without `/v1`.
        rate: Requests per second, as a Poisson process; None: as soon as another one ends.
        concurrency: Most requests at once.
    """

    url: str
    model: str
    prompts: Sequence[str]
    output_tokens: int
    concurrency: int
    rate: float | None = None


def run(python: str, job: Job, key: str, on_progress: Callable[[int], None]) -> list[RequestRecord]:
    """Send all requests and return what was measured of each. An exception, such as Ctrl-C, ends it.

    Args:
        python: Of the engine's environment.
        job: What to send.
        key: Empty: the service needs none.
        on_progress: Called with the number of requests that have ended.

    Raises:
        ServiceError: The benchmark failed.
    """
    process = None
    try:
        with interrupts.held_back():
            process = subprocess.Popen(
                [python, "-P", "-m", "vllm_service.bench"],
                env=_environment(os.environ, key),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )
        assert process.stdin and process.stdout and process.stderr  # noqa: S101 - they are pipes
        last: deque[str] = deque(maxlen=20)
        reader = threading.Thread(target=_read, args=(process.stderr, on_progress, last), daemon=True)
        reader.start()
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its last lines say why
            process.stdin.write(json.dumps(asdict(job)).encode())
            process.stdin.close()
        output = process.stdout.read()
        code = process.wait()
        reader.join()
    finally:
        if process and process.poll() is None:
            kill_group(process.pid, _KILL_S)
            process.wait()
    if code != 0:
        why = next((line for line in reversed(last) if line.strip()), "it printed nothing")
        raise ServiceError(f"vLLM's benchmark ended with code {code}: {why}.", hint="Run the same command again.")
    return list(records(json.loads(output), job.output_tokens))


def records(result: Mapping[str, Any], output_tokens: int) -> Iterator[RequestRecord]:
    """Yield a record for each request of a result."""
    names = ("start_times", "ttfts", "itls", "latencies", "input_lens", "output_lens", "errors")
    for start, ttft, gaps, latency, tokens_in, tokens_out, error in zip(*(result[name] for name in names), strict=True):
        text = _error(error) if error else ""
        if not error and tokens_out <= 1 < output_tokens:  # without a count at its end, vLLM puts 1 there
            text = CUT_SHORT
        yield RequestRecord(start, ttft, gaps, latency, tokens_in, 0 if text else tokens_out, text)


def _error(text: str) -> str:
    """Return the kind of an error: vLLM has the reason phrase of an answer, or a traceback."""
    line = next(line for line in reversed(text.splitlines()) if line.strip()).strip()
    return _PHRASES.get(line, _MODULES.sub("", line)[:_ERROR_LENGTH])


def _environment(environ: Mapping[str, str], key: str) -> dict[str, str]:
    found = {name: environ[name] for name in (*_KEPT, *_PROXIES) if name in environ}
    found |= {
        "PYTHONPATH": str(_IN_ENGINE),
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return found | ({"OPENAI_API_KEY": key} if key else {})


def _read(stderr: IO[bytes], on_progress: Callable[[int], None], last: deque[str]) -> None:
    while data := stderr.read1(65536):  # type: ignore[attr-defined] # a pipe is a BufferedReader
        if found := _PROGRESS.findall(data):
            on_progress(int(found[-1]))
        last.extend(data.decode(errors="replace").splitlines())
