"""Runs Locust's users against a service, in Locust's own environment, and reads what they have measured."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from service import interrupts
from service.benchmarks.report import RequestRecord
from service.engine.built_once import build_once, cache_home, check_uv, install, make_venv
from service.engine.environment import PINS, pinned
from service.engine.installer import OnProgress
from service.engine.process_group import kill_group
from service.errors import ServiceError

LOCK = "locust.lock"
STOP_S = 30  # for requests in flight at the end
_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_NAME = "Locust's environment"
_NEEDED_GB = 0.2  # 39 MB were measured, and its download cache
_POLL_S = 0.05
_PROGRESS_S = 1.0
_KILL_S = 5.0


@dataclass(frozen=True)
class Users:
    """The users of a load test.

    Attributes:
        url: Of the service, without `/v1`.
        users: How many there are at the most.
        spawn_rate: How many come per second.
        run_time_s: From the first one on.
        pause_s: Between an answer and the next question: the shortest and the longest pause.
        timeout_s: How long an answer may be silent.
        processes: Locust's own, each of which uses one core at most.
    """

    url: str
    model: str
    users: int
    spawn_rate: float
    run_time_s: int
    output_tokens: int
    pause_s: tuple[float, float] = (1.0, 5.0)
    timeout_s: float = 600.0
    processes: int = 1


def version() -> str:
    """Return Locust's pinned version."""
    return pinned(LOCK, "locust")


def ensure_python(on_progress: OnProgress = lambda _: None) -> str:
    """Return a Python that has Locust: this one, as in Modal's image, else that of its own environment, built once.

    Raises:
        EnvironmentBuildError: The environment could not be installed.
        DiskSpaceError: It would not fit.
    """
    if importlib.util.find_spec("locust"):
        return sys.executable
    digest = hashlib.sha256(f"{sys.version_info[:3]}{sys.base_prefix}".encode() + (PINS / LOCK).read_bytes())
    root = cache_home() / "locust" / digest.hexdigest()[:12]

    def build() -> None:
        make_venv(root, _NAME)
        locked = ("--require-hashes", "--no-deps", "-r", str(PINS / LOCK))
        check_uv("pip install", install(root, on_progress, *locked), _NAME)

    build_once(root, _NAME, f"Locust {version()}", _NEEDED_GB, build)
    return str(root / "bin" / "python")


def run(python: str, users: Users, key: str, on_progress: Callable[[int, int], None]) -> list[RequestRecord]:
    """Run the load test; blocks for its run time, and up to `STOP_S` more. An exception, such as Ctrl-C, ends it.

    What was measured before Locust broke off is returned with one more record, whose error says so.

    Args:
        python: What has Locust.
        users: Who sends what.
        key: Empty: the service needs none.
        on_progress: Called every second with the seconds since the start, and the number of requests that have ended.

    Raises:
        ServiceError: Locust broke off before a request had ended.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-service-loadtest-") as directory:
        log = Path(directory, "locust.log")
        process = None
        try:
            with log.open("wb") as output, interrupts.held_back():
                process = subprocess.Popen(
                    [python, "-P", "-m", "locust", *_options(users)],
                    env=_environment(os.environ, users, key, directory),
                    cwd=directory,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for this process, which ends that one
                )
            _wait(process, Path(directory), on_progress)
        finally:
            if process and process.poll() is None:
                kill_group(process.pid, _KILL_S)  # its other processes too; what was measured is in files
                process.wait()
        found = list(_records(Path(directory)))
        if process.returncode:  # requests that fail are no reason: --exit-code-on-error
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
            broken_off = f"Locust ended with code {process.returncode}: {lines[-1]}"
            if not found:
                raise ServiceError(f"{broken_off}.")
            found.append(RequestRecord(max(one.start_s + one.latency_s for one in found), error=broken_off))
        return found


def _options(users: Users) -> list[str]:
    options = {
        "--locustfile": _LOCUSTFILE,
        "--host": users.url,
        "--users": users.users,
        "--spawn-rate": users.spawn_rate,
        "--run-time": f"{users.run_time_s}s",
        "--stop-timeout": STOP_S,
        "--loglevel": "ERROR",
    }
    listed = [part for name, value in options.items() for part in (name, str(value))]
    more = ["--processes", str(users.processes)] if users.processes > 1 else []
    return [*listed, *more, "--headless", "--only-summary", "--exit-code-on-error", "0"]


def _environment(environ: Mapping[str, str], users: Users, key: str, directory: str) -> dict[str, str]:
    ours = ("LOCUST_", "MODAL_", "SERVICE_", "VLLM_", "API_KEY")
    found = {name: value for name, value in environ.items() if not name.startswith(ours)}
    found["LOADTEST_JOB"] = json.dumps({**asdict(users), "directory": directory})
    return found | ({"VLLM_API_KEY": key} if key else {})


def _wait(process: subprocess.Popen[bytes], directory: Path, on_progress: Callable[[int, int], None]) -> None:
    began = shown = time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_S)
        if (now := time.monotonic()) - shown >= _PROGRESS_S:
            shown = now
            on_progress(int(now - began), sum(1 for _ in _lines(directory)))


def _lines(directory: Path) -> Iterator[str]:
    for file in directory.glob("*.jsonl"):
        with file.open() as lines:
            yield from lines


def _records(directory: Path) -> Iterator[RequestRecord]:
    for line in _lines(directory):
        if line.endswith("\n"):  # else its process was killed while it wrote
            yield RequestRecord(**json.loads(line))
