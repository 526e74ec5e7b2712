"""Weights: `weights.fetch` against `hf download`, one client and hub on loopback, interleaved. `make bench-weights`.

A hub in a process of its own serves 2 GB in 40 files of random content. Each download runs in a process of its own,
with an empty cache, and is timed from its spawn to its end; ours also verifies every file. A round is ours, theirs,
theirs, ours and gives one ratio, because a download that follows one of the other kind is slower. Memory is the sum of
a download's processes, sampled every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from bench.report import Report
from tests.fakes.hub import Content, Hub, Repository, serving

COMMIT = "ab" * 20
FILES, FILE_BYTES = 40, 50_000_000
SAMPLE_S = 0.05
# What a replica runs. FIND fails when it opens a connection, since none is needed.
OURS = f"""
import sys, time
from service.weights import store as weights
from service.registry.models import ModelSpec
spec = ModelSpec(key="bench", hub_id="org/bench", revision="{COMMIT}")
"""
FETCH = OURS + "weights.fetch(spec)"
FIND = (
    OURS
    + """
import socket
def refuse(*_): raise SystemExit("a connection was made")
socket.socket.connect = socket.getaddrinfo = refuse
began = time.monotonic()
found = weights.ensure(spec)
print(time.monotonic() - began)
assert not found.fetched and "huggingface_hub" not in sys.modules
"""
)
VERIFY = (
    OURS
    + """
began = time.monotonic()
faults = weights.verify(spec, workers=2)
print(time.monotonic() - began)
assert not faults, faults
"""
)


def main() -> int:
    """Measure, print the figures and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs of each")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    with TemporaryDirectory(prefix="bench-weights-") as directory:
        return Bench(Path(directory)).run(arguments.rounds)


def serve(directory: Path) -> int:
    """Serve the hub until standard input is closed."""
    files: dict[str, Content] = {file.name: file for file in sorted(directory.iterdir())}
    files["config.json"] = b"{}"
    repository = Repository(COMMIT, files, large=("*.safetensors",))
    for name in files:
        repository.entry(name)  # computes the checksums before a client waits for them
    with serving(Hub(repositories={"org/bench": repository})) as hub:
        print(hub.url, flush=True)
        sys.stdin.read()
    return 0


class Bench:
    """Runs the downloads, one after the other."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._model = directory / "model"
        self._cache = directory / "cache"
        self._hf = str(Path(sys.executable).with_name("hf"))

    def run(self, rounds: int) -> int:
        """Measure everything; return the exit code."""
        self._make_model()
        report = Report("weights")
        seconds: dict[str, list[float]] = {"weights.fetch": [], "hf download": []}
        memory: list[float] = []
        with self._hub() as url:
            self._download("hf download", url)  # warms the page cache and the interpreters' files
            for number in range(1, rounds + 1):
                for name in ("weights.fetch", "hf download", "hf download", "weights.fetch"):
                    took, peak_mb = self._download(name, url)
                    seconds[name].append(took)
                    memory += [peak_mb] if name == "weights.fetch" else []
                print(f"round {number}: " + ", ".join(f"{name} {times[-2:]}" for name, times in seconds.items()))
        for name, times in seconds.items():
            report.sample(name, times)
        mine, theirs = ([sum(pair) for pair in batched(times)] for times in seconds.values())
        ratios = [ours / plain for ours, plain in zip(mine, theirs, strict=True)]
        report.add("weights.fetch / hf download, median ratio", statistics.median(ratios), 1.05)
        report.add("memory of its processes together", max(memory), 300, "MB")
        found = [float(self._python(FIND)) * 1000 for _ in range(7)]
        report.add("second ensure, no connection made", max(found), 50, "ms")
        ours, sums, openssl = [], [], []
        for _ in range(rounds):
            ours.append(float(self._python(VERIFY)))
            sums.append(self._checksums("sha256sum"))
            openssl.append(self._checksums("openssl dgst -sha256"))
        for name, times in (("verify, two workers", ours), ("sha256sum, xargs -P2", sums)):
            report.sample(name, times)
        rate = statistics.median(theirs / mine for mine, theirs in zip(ours, sums, strict=True))
        report.add("time of verify / of sha256sum, 1 / 0.8 at most", 1 / rate, 1.25)
        if all(openssl):
            report.sample("openssl dgst -sha256, xargs -P2", openssl)
        return report.finish()

    def _make_model(self) -> None:
        self._model.mkdir()
        with Path("/dev/urandom").open("rb") as noise:
            for number in range(1, FILES + 1):
                name = f"model-{number:05}-of-{FILES:05}.safetensors"
                (self._model / name).write_bytes(noise.read(FILE_BYTES))
        index = {"weight_map": {file.name: file.name for file in self._model.iterdir()}}
        (self._model / "model.safetensors.index.json").write_text(json.dumps(index))

    @contextmanager
    def _hub(self) -> Iterator[str]:
        command = [sys.executable, "-m", "bench.weights", "--serve", str(self._model)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes, text=True) as server:  # type: ignore[call-overload]
            yield server.stdout.readline().strip()
            server.stdin.close()

    def _environment(self, url: str = "http://127.0.0.1:9") -> dict[str, str]:
        ours = {"HF_HOME": str(self._cache), "HF_ENDPOINT": url, "PYTHONPATH": str(Path(__file__).parents[1])}
        return {**os.environ, **ours, "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def _download(self, name: str, url: str) -> tuple[float, float]:
        """Return seconds and peak megabytes of one download into an empty cache."""
        shutil.rmtree(self._cache, ignore_errors=True)
        os.sync()  # the writes of the last download must not delay this one
        theirs = [self._hf, "download", "org/bench", "--revision", COMMIT, "--quiet"]
        command = theirs if name == "hf download" else [sys.executable, "-c", FETCH]
        began = time.monotonic()
        process = subprocess.Popen(command, env=self._environment(url), stdout=subprocess.DEVNULL)
        weigher = Weigher(process.pid)
        if process.wait():
            raise SystemExit(f"{name} ended with {process.returncode}")
        return time.monotonic() - began, weigher.peak_mb()

    def _python(self, program: str) -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=self._environment(), stdout=subprocess.PIPE, text=True, check=True).stdout

    def _checksums(self, command: str) -> float:
        """Return the seconds that a command needs for all files, two at a time; 0 where it is not installed."""
        if not shutil.which(command.split(maxsplit=1)[0]):
            return 0.0
        files = "\n".join(str(file) for file in sorted(self._model.iterdir()))
        argv = ["xargs", "-P2", "-n1", *command.split()]
        began = time.monotonic()
        subprocess.run(argv, input=files, stdout=subprocess.DEVNULL, text=True, check=True)
        return time.monotonic() - began


def batched(times: list[float]) -> list[list[float]]:
    """Return the two times of each round."""
    return [times[begin : begin + 2] for begin in range(0, len(times), 2)]


class Weigher:
    """Samples the memory of a process and its children while it runs."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._peak = 0.0
        self._thread = threading.Thread(target=self._weigh)
        self._thread.start()

    def peak_mb(self) -> float:
        """Wait until the process has ended; return the peak of the sum in 10^6 bytes."""
        self._thread.join()
        return self._peak

    def _weigh(self) -> None:
        while True:
            try:
                family = [self._process, *self._process.children(recursive=True)]
                self._peak = max(self._peak, sum(member.memory_info().rss for member in family) / 1e6)
                if self._process.status() == psutil.STATUS_ZOMBIE:
                    return
            except psutil.NoSuchProcess:
                if not self._process.is_running():
                    return
            time.sleep(SAMPLE_S)


if __name__ == "__main__":
    sys.exit(main())
