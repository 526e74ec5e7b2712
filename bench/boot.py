"""Boot: from the command to an answer, `make serve`'s path against plain vLLM. Run by `make bench-boot`.

Interleaved runs of both with the same tiny model on the same machine, both polled at /health every 50 ms from the spawn
of the process a user would start. Beside it: the light commands' times and the supervising process's memory.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from bench.report import Report
from service import engine_env
from service.models import Registry

POLL_S = 0.05
LIMIT_S = 180.0


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs of each")
    rounds = parser.parse_args().rounds
    env = engine_env.ensure(print)
    report = Report("boot")
    ours: list[float] = []
    plain: list[float] = []
    parents_mb: list[float] = []
    for number in range(1, rounds + 1):
        plain.append(_boot(lambda port: _plain_vllm(env.python, port)))
        ours.append(_boot(_service, look=lambda pid: parents_mb.append(psutil.Process(pid).memory_info().rss / 1e6)))
        print(f"round {number}: plain vLLM {plain[-1]:.1f} s, this service {ours[-1]:.1f} s", flush=True)
    report.sample("plain `vllm serve --enforce-eager` to /health", plain)
    report.sample("`vllm-service up` to /health, canary answered", ours)
    ratios = [mine / theirs for mine, theirs in zip(ours, plain, strict=True)]
    report.add("boot: this service / plain vLLM, median ratio", statistics.median(ratios), 0.70)
    report.add("memory of the supervising process", max(parents_mb), 120, "MB")
    bin_directory = Path(sys.executable).parent
    report.add("vllm-service --help", _median([str(bin_directory / "vllm-service"), "--help"]), 0.35, "s")
    report.add("python -c 'import service.server'", _median([sys.executable, "-c", "import service.server"]), 1.0, "s")
    return report.finish()


def _service(port: int) -> list[str]:
    os.environ["SERVICE_PORT"] = str(port)
    return [str(Path(sys.executable).parent / "vllm-service"), "up", "tiny"]


def _plain_vllm(python: str, port: int) -> list[str]:
    model = Registry.load().find("tiny").spec.directory
    entry = "vllm.entrypoints.launchers.api_server.entry"  # what `vllm serve` runs; the CPU build lacks the command
    flags = ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048"]
    flags += ["--kv-cache-memory-bytes", str(64 * 1024**2)]  # as small as ours: else it claims nearly all memory
    return [python, "-m", entry, "--model", str(model), *flags]


def _boot(command: Callable[[int], list[str]], look: Callable[[int], None] = lambda _: None) -> float:
    """Return seconds from spawn to the first 200 of /health; end everything afterwards."""
    port = _free_port()
    argv = command(port)
    with TemporaryDirectory() as state:
        env = {**os.environ, "XDG_STATE_HOME": state, "VLLM_NO_USAGE_STATS": "1"}
        began = time.monotonic()
        process = subprocess.Popen(
            argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, start_new_session=True
        )
        try:
            while not _healthy(port):
                if process.poll() is not None:
                    raise SystemExit(f"{argv[0]} ended with {process.returncode} before it was ready")
                if time.monotonic() - began > LIMIT_S:
                    raise SystemExit(f"{argv[0]} was not ready after {LIMIT_S:.0f} s")
                time.sleep(POLL_S)
            seconds = time.monotonic() - began
            look(process.pid)
            return seconds
        finally:
            _end(process)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    process.send_signal(signal.SIGINT)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
    for member in family:
        if member.is_running():
            member.kill()
    psutil.wait_procs(family, timeout=10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _median(argv: list[str], runs: int = 7) -> float:
    times = []
    for _ in range(runs):
        began = time.monotonic()
        subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
        times.append(time.monotonic() - began)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
